"""Is a fall of some figures more than chance? Tests of before against after, and of several of them together."""

from __future__ import annotations

import math
from collections.abc import Sequence


def sign_test(lost: int, gained: int) -> float:
    """The chance that so many or more of the examples that changed were lost, if each was as likely lost as gained.

    The exact one-sided sign test: of right answers before and after it is McNemar's test (McNemar 1947).

    Args:
        lost: the number of examples whose answer is worth less than before.
        gained: the number of those whose answer is worth more.
    """
    changed = lost + gained
    return float(sum(math.comb(changed, k) for k in range(lost, changed + 1)) / 2**changed)


def fall_test(before: float, after: float, examples: int) -> float:
    """The chance of such a fall between two shares, each of `examples` examples, if it is not known which of them
    changed: the one-sided test of two independent shares.

    Shares of the same examples vary less, so the chance is never given too small.
    """
    both = (before + after) / 2
    error = math.sqrt(max(0.0, 2 * both * (1 - both) / max(1, examples)))
    if error == 0:
        return 1.0 if after >= before else 0.0
    return 0.5 * math.erfc((before - after) / error / math.sqrt(2))


def holm(chances: Sequence[float], level: float) -> list[bool]:
    """Which of several tests reject, so that in all the chance of a wrong rejection is at most `level` (Holm 1979)."""
    rejected = [False] * len(chances)
    for rank, place in enumerate(sorted(range(len(chances)), key=lambda i: chances[i])):
        if chances[place] > level / (len(chances) - rank):
            break
        rejected[place] = True
    return rejected
