"""Do two samples of features come from one distribution, and how many of the second lie far from all of the first?"""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from torch import Tensor

NEAREST = 3
"""A point is as far away as it is from so many of its nearest neighbours, on average."""
FAR = 0.05
"""This share of the first sample counts as far away."""

CHUNK = 2000
"""Ways to divide the examples that are looked at together."""
SURE = 0.99
"""In so many of first samples `for_this` holds what it promises."""


def scaled(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Both samples `(n, D)` and `(m, D)`, with each column divided by its standard deviation over both."""
    both = torch.cat([first, second]).double()
    spread = both.std(0)
    scale = torch.where(spread > 1e-9 * both.abs().amax(0), spread, torch.inf)
    return first.double() / scale, second.double() / scale


def energy_test(first: Tensor, second: Tensor, draws: int, generator: torch.Generator) -> tuple[float, float]:
    """The energy distance of two samples, and the chance of one that large if both are of one distribution.

    The distance is `2 E|X − Y| − E|X − X'| − E|Y − Y'|` (Székely & Rizzo 2004). The chance is that of a permutation
    test: it is exact for any number of examples and of columns.

    Args:
        first: `(n, D)`.
        second: `(m, D)`.
        draws: how many ways to divide the examples into two samples are drawn.
        generator: draws them.
    """
    both = torch.cat([first, second]).double()
    apart, size = torch.cdist(both, both), len(second)
    n, m = len(first), size
    found = []
    for start in range(0, draws, CHUNK):
        ways = torch.rand(min(CHUNK, draws - start), n + m, generator=generator, dtype=torch.float64)
        chosen = torch.zeros(n + m, len(ways) + 1, dtype=torch.float64)
        chosen[n:, 0] = 1  # as it is
        chosen[:, 1:].scatter_(0, ways.argsort(1)[:, :m].T, 1.0)
        inside = (chosen * (apart @ chosen)).sum(0)
        across = apart.sum(0) @ chosen - inside
        without = apart.sum() - 2 * across - inside
        found.append(2 * across / (n * m) - without / n**2 - inside / m**2)
    here = float(found[0][0])
    as_large = sum(int((some[1:] >= here * (1 - 1e-9)).sum()) for some in found)
    return here, (1 + as_large) / (1 + draws)


def far_test(first: Tensor, second: Tensor) -> tuple[Tensor, float]:
    """Which of the second sample lie far from all of the first, bool `(m,)`; and the chance of so many.

    Far is what is farther from its nearest neighbours in the first sample than all but a share `FAR` of the first
    sample is from its own. If both samples are of one distribution, each order of all of these distances is as likely,
    so the number has a negative hypergeometric distribution, in which the first sample's own size counts too.

    Args:
        first: `(n, D)`.
        second: `(m, D)`.
    """
    n, m = len(first), len(second)
    own = torch.cdist(first, first).fill_diagonal_(torch.inf)
    k = min(NEAREST, n - 1)
    known = own.topk(k, dim=1, largest=False).values.mean(1)
    new = torch.cdist(second, first).topk(k, dim=1, largest=False).values.mean(1)
    rank = max(1, math.floor(FAR * n))
    bar = known.topk(rank).values[-1]
    far = new > bar
    return far, beyond(int(far.sum()), m, rank, n)


def beyond(count: int, m: int, rank: int, n: int) -> float:
    """The chance that `count` or more of `m` values are beyond the `rank`-th largest of `n` others, if all `n + m` are
    alike."""
    whole = _log_choose(n + m, m)
    parts = [_log_choose(c + rank - 1, c) + _log_choose(n - rank + m - c, m - c) for c in range(count, m + 1)]
    return min(1.0, math.fsum(math.exp(part - whole) for part in parts))


def draws_for(level: float, sure: float = SURE) -> int:
    """How many permutations `energy_test` needs, so that what `for_this` makes of its smallest chance is well below
    `level`, whatever the sizes of the samples are."""
    normal = NormalDist()
    most = math.hypot(normal.inv_cdf(level), normal.inv_cdf(sure))
    return math.ceil(2 / normal.cdf(-most))


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def for_this(chance: float, n: int, m: int, sure: float = SURE) -> float:
    """The chance for the one first sample that there is, where `chance` is that over all first samples.

    A test of two samples is right on average over both. But the first sample stays the same for many second ones, and
    if it happens to be an odd one, each of them looks different. So its part of the noise, of variance `m / n` times
    that of the second, is taken as large as it is in all but a share `1 − sure` of first samples; the distance is taken
    as normal.
    """
    if not 0 < chance < 1:
        return min(1.0, max(0.0, chance))
    normal, part = NormalDist(), m / n
    beyond = -normal.inv_cdf(chance) * math.sqrt(1 + part) - normal.inv_cdf(sure) * math.sqrt(part)
    return 1 - normal.cdf(beyond)
