"""From what trials measured to what all tasks will take."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

from perpetune.forecast.sample import Sizes
from perpetune.forecast.trial import Counts, Measured, Trial, passes_of
from perpetune.recipe import Every, Recipe
from perpetune.state.prune import oldest_kept
from perpetune.tally import SAMPLE

GROWS = 0.25
"""A later task that takes by this share longer than the one before says that tasks grow dearer; less is noise."""
Features = Callable[[Counts], list[float]]
FEATURES: dict[str, Features] = {
    "prepare": lambda c: [1, c.checked],
    "learn": lambda c: [1, c.train * c.passes],
    "in statistics": lambda c: [1, c.train],
    "in protect": lambda c: [1, c.train],
    "new": lambda c: [1, c.test],
    "earlier": lambda c: [c.others, c.asked],
    "drift": lambda c: [1, c.others],
    "oracle": lambda c: [1, c.seen] if c.seen else [0, 0],
    "rest": lambda c: [1, c.ahead],
    "commit": lambda c: [1, c.others],
    "report": lambda c: [1, c.index],
    "other": lambda c: [1],
}
"""What the seconds of each part are a sum of, each with a factor that is not negative."""
BY_KIND = {"learn", "in statistics", "in protect", "rest", "other"}
"""Parts that the first task and later ones may have in different ways."""


def nonnegative(rows: Sequence[Sequence[float]], values: Sequence[float]) -> list[float]:
    """Factors `x >= 0` with the least squares of `rows x - values`, by trying which of the few are 0."""
    A, y = np.array(rows, dtype=float), np.array(values, dtype=float)
    best, least = np.zeros(A.shape[1]), float(y @ y)
    for count in range(1, A.shape[1] + 1):
        for some in itertools.combinations(range(A.shape[1]), count):
            x = np.zeros(A.shape[1])
            x[list(some)] = np.linalg.lstsq(A[:, list(some)], y, rcond=None)[0]
            off = float(((A @ x - y) ** 2).sum())
            if (x >= 0).all() and off < least * (1 - 1e-9):
                best, least = x, off
    return [float(value) for value in best]


class Costs:
    """The seconds of a task as a function of its counts, fitted to the tasks of trials.

    Args:
        measured: tasks of trials with warm code.

    Attributes:
        growth: the share by which each later task takes longer to learn than the one before; 0 where it is noise.
    """

    def __init__(self, measured: Sequence[Measured]):
        self.measured = measured
        self.growth = self._growth()
        self._factors = {(part, first): self._fitted(part, first) for part in FEATURES for first in (0, 1)}

    def of(self, counts: Counts) -> dict[str, float]:
        """The seconds of each part of a task."""
        found = {}
        for part, features in FEATURES.items():
            factors = self._factors[part, int(counts.index == 0)]
            value = sum(f * x for f, x in zip(factors, features(counts), strict=True))
            found[part] = value * (1 + self.growth * max(0, counts.index - 1) if part in GROWING else 1)
        return found

    def _fitted(self, part: str, first: int) -> list[float]:
        features = FEATURES[part]
        some = [m for m in self.measured if part not in BY_KIND or (m.counts.index == 0) == bool(first)]
        rows, values = [features(m.counts) for m in some], [m.seconds[part] for m in some]
        if part in GROWING and not first and self.growth:
            values = [v / (1 + self.growth * (m.counts.index - 1)) for v, m in zip(values, some, strict=True)]
        return nonnegative(rows, values) if rows else [0.0] * len(features(self.measured[0].counts))

    def _growth(self) -> float:
        """From tasks 1 and 2 of one trial, which follow each other in the list."""
        for one, two in itertools.pairwise(self.measured):
            if (one.counts.index, two.counts.index) == (1, 2):
                speeds = [m.seconds["learn"] / max(1, m.counts.train * m.counts.passes) for m in (one, two)]
                share = speeds[1] / max(1e-9, speeds[0]) - 1
                return share if share > GROWS else 0.0
        return 0.0


GROWING = {"learn", "in statistics", "in protect"}


def planned(sizes: dict[int, Sizes], recipe: Recipe, *, keeps_data: bool) -> list[Counts]:
    """The counts of all tasks of a stream."""
    order = [sizes[i] for i in sorted(sizes)]
    train = list(itertools.accumulate(s.train for s in order))
    found = []
    for index, size in enumerate(order):
        others = [s.test for s in order[:index] if s.test]
        others = others if _turn(recipe, index, len(order)) else []
        future = recipe.evaluate.future
        if recipe.setting == "domain" and not future and index + 1 < len(order):
            others.append(order[index + 1].test)
        oracle = recipe.evaluate.oracle
        seen = train[index] if oracle is True or (oracle and index + 1 == len(order)) else 0
        found.append(
            Counts(
                index,
                size.train + size.validation + size.test,
                train[index] if keeps_data else size.train,
                size.test,
                len(others),
                sum(others),
                sum(s.test for s in order[index + 1 :]) if future else 0,
                seen,
                passes_of(recipe, index),
            )
        )
    return found


def _turn(recipe: Recipe, index: int, count: int) -> bool:
    """Whether earlier tasks are asked after that one."""
    earlier = recipe.evaluate.earlier
    return not isinstance(earlier, Every) or (index + 1) % earlier.every == 0 or index + 1 == count


def steps_of(counts: Counts, measured: Sequence[Measured]) -> int:
    """The optimizer steps of a task, as those of the measured task that is most like it."""
    like = [m for m in measured if (m.counts.index == 0) == (counts.index == 0)] or list(measured)
    model = max(like, key=lambda m: m.counts.train)
    share, factor = counts.train / max(1, model.counts.train), counts.passes / max(1.0, model.counts.passes)
    return sum(
        round(epochs * factor) * max(1, math.ceil(steps / epochs * share)) for steps, epochs in model.phases if epochs
    )


def disk(counts: Sequence[Counts], recipe: Recipe, long: Trial, short: Trial) -> tuple[int, list[int]]:
    """The bytes of the state folder after a run, and what each task takes of them.

    Args:
        long: the trial with most tasks.
        short: the one with a task less, or another of as many tasks where the stream has no more.
    """
    known, last = long.tasks, len(long.tasks) - 1
    grows = known[2].own - known[1].own if last >= 2 else 0

    each_test = bytes_each(long.tasks[0], short.tasks[0])

    def own(index: int) -> int:
        like = known[min(index, last)]
        more = min(SAMPLE, counts[index].test) - min(SAMPLE, like.counts.test)
        return like.own + grows * max(0, index - last) + round(each_test * max(0, more))

    def dropped(index: int) -> int:
        known_one = known[min(index, max(0, last - 1))]
        return known_one.pruned if known_one.pruned is not None else own(index)

    def alone(index: int) -> int:
        return known[min(index, max(0, last - 1))].alone or 0

    oldest = 0
    for index in range(len(counts)):
        needs = known[min(index, last)].needs
        oldest = oldest_kept(recipe.run.keep, oldest, needs, [alone(i) for i in range(index)])
    each = [dropped(i) if i < oldest else own(i) for i in range(len(counts))]
    more = len(counts) - len(known)
    less = len(known) - len(short.tasks)
    rest = long.bytes + more * ((long.bytes - short.bytes) // less if less else 0)
    pages = known[last].pages + more * ((known[last].pages - short.tasks[-1].pages) // less if less else 0)
    return sum(each) + rest + pages + kept_bytes(counts, long, recipe.evaluate.keep), each


def bytes_each(one: Measured, two: Measured) -> float:
    """The bytes of a task's folder for each test example whose features are sampled, from two trials of one task."""
    more = min(SAMPLE, two.counts.test) - min(SAMPLE, one.counts.test)
    return max(0.0, (two.own - one.own) / more) if more > 0 else 0.0


def kept_bytes(counts: Sequence[Counts], long: Trial, most: float) -> int:
    """The bytes of the features of test examples that lie in the state in the end.

    Args:
        most: of `evaluate.keep`, in GiB.
    """
    sets, size = long.tasks[-1].kept
    if not sets:
        return 0
    every = len(long.tasks) > 1 and sets > long.tasks[-2].kept[0]
    tests = [task.counts.test for task in long.tasks][-sets:]
    asked = [c.test for c in counts] if every else [c.test for c in counts[-sets:]]
    return min(int(size * sum(asked) / max(1, sum(tests))), int(most * 2**30))
