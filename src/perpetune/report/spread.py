"""A figure of several runs: its mean and its standard deviation."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TypedDict


class Spread(TypedDict):
    """`n` runs have the figure: their mean, their sample standard deviation (None for one run), all values."""

    mean: float | None
    std: float | None
    n: int
    values: list[float | None]


def spread(values: Sequence[float | None]) -> Spread:
    """Mean and sample standard deviation (n - 1) of the values that are not None."""
    known = [v for v in values if v is not None]
    mean = statistics.fmean(known) if known else None
    return {
        "mean": mean,
        "std": statistics.stdev(known) if len(known) > 1 else None,
        "n": len(known),
        "values": list(values),
    }
