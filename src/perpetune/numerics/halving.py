"""Sets of points, each divided into two halves by the distances of its points: many sets at once.

A tree of `N` points has as many nodes. Node by node, most of the time would go into calls of small operations; level by
level there are `log2 N` of each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from perpetune.numerics.signature import distance

NUMBERS = 2**18  # so many are compared at once: with fewer, calls take most of the time, and more leave the cache
REFINEMENTS = 8  # the most refinements of a cut; two or three are usual

Rows = NDArray[np.int64]
Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]


class Sets:
    """Sets of rows of a table, none of them empty, side by side: `(S, m)`, where `m` is the size of the largest.

    Args:
        rows: the rows of all sets, one set behind the other; within a set ascending.
        sizes: the numbers of rows.
    """

    def __init__(self, rows: Rows, sizes: Sequence[int]):
        counts = np.array(sizes)[:, None]
        places = np.arange(counts.max())
        self.there: Bools = places < counts
        """`(S, m)`, whether there is such a row. A shorter set is filled up with its last row."""
        self.rows: Rows = rows[np.cumsum(counts)[:, None] - counts + np.minimum(places, counts - 1)]

    def points(self, table: Tensor) -> Tensor:
        """The points of the sets, `(S, m, L, k)`, from a table `(N, L, k)`."""
        if len(self.rows) == 1 and self.rows.size == len(table):
            return table[None]
        points = table.index_select(0, torch.from_numpy(self.rows.ravel()))
        return points.view(*self.rows.shape, *table.shape[1:])


def distances(points: Tensor, centres: Tensor) -> Floats:
    """The distance of each point of `(S, m, L, k)` to the centre of its set, one of `(S, L, k)`."""
    (count, most), rows = points.shape[:2], at_once(points)
    found, some = np.empty((count, most), dtype=np.float32), max(1, rows // most)
    for i in range(0, count, some):
        for j in range(0, most, rows):
            far = distance(points[i : i + some, j : j + rows], centres[i : i + some, None])
            found[i : i + some, j : j + rows] = far.numpy()
    return found


def at_once(points: Tensor) -> int:
    """How many points `(…, L, k)` are compared at once."""
    return max(1, NUMBERS // max(1, points.shape[-2] * points.shape[-1]))


def means(points: Tensor, among: Bools) -> Tensor:
    """The means of some points of each set, `(S, g, L, k)` float32.

    They are summed in float64. Points are float32 and of like sizes, so their sums are exact and in no order.

    Args:
        points: `(S, m, L, k)`.
        among: `(S, g, m)`, which points count for each of `g` means; at least one.
    """
    flat, weights, rows = points.flatten(2), torch.from_numpy(among).double(), at_once(points)
    found, some = torch.empty(*among.shape[:2], flat.shape[2]), max(1, rows // flat.shape[1])
    for i in range(0, len(flat), some):
        part, total = weights[i : i + some], torch.zeros((), dtype=torch.float64)
        for j in range(0, flat.shape[1], rows):
            total = total + part[..., j : j + rows] @ flat[i : i + some, j : j + rows].double()
        found[i : i + some] = total / part.sum(-1, keepdim=True)
    return found.view(*among.shape[:2], *points.shape[2:])


def halved(points: Tensor, there: Bools, far: Callable[[Rows], Floats] | None = None) -> tuple[Bools, Bools]:
    """Divide sets of points into halves.

    A cut takes two points that are far apart: the one farthest from the mean, and the one farthest from that one. It
    sorts the others by the difference of their distances to these two, and cuts in the middle. Then it repeats this
    with the means of the halves until nothing changes.

    Args:
        points: `(S, m, L, k)`.
        there: of the `Sets`.
        far: gives the distances from one point of each set, of which it gets the places, to all others; where they are
            known they need not be computed.

    Returns:
        `(S, m)`, whether a point is in the first half; and `(S,)`, whether not all points of a set are equal. If they
        are, its halves mean nothing.
    """
    each, far = (
        np.arange(len(points)),
        far or (lambda places: distances(points, points[np.arange(len(points)), places])),
    )
    first = _farthest(distances(points, means(points, there[:, None])[:, 0]), there)
    to_first = far(first)
    second = _farthest(to_first, there)
    left = _cut(to_first, far(second), there)
    apart: Bools = to_first[each, second] > 0
    at = each[apart]  # the sets whose halves may still change
    points, there = _only(points, there, apart)
    for _ in range(REFINEMENTS):
        if not len(at):
            break
        before = left[at]
        centres = means(points, np.stack([before & there, ~before & there], 1))
        now = _cut(distances(points, centres[:, 0]), distances(points, centres[:, 1]), there)
        changed = ((now != before) & there).any(1)
        left[at] = now
        at = at[changed]
        points, there = _only(points, there, changed)
    return left, apart


def _farthest(values: Floats, there: Bools) -> Rows:
    """For each set the place of the highest value; of several the first."""
    found: Rows = np.where(there, values, -np.inf).argmax(1)
    return found


def _cut(to_left: Floats, to_right: Floats, there: Bools) -> Bools:
    """Divide each set into two halves: the points nearer to one centre, compared with the others, and those nearer to
    another one. An odd one in the middle goes where it is nearer. Returns which are in the first half."""
    more = np.where(there, to_left.astype(np.float64) - to_right, np.inf)
    order, sizes = more.argsort(1, kind="stable"), there.sum(1)  # of equals the first comes first
    middle = sizes // 2
    odd = more[np.arange(len(more)), order[np.arange(len(more)), middle]] <= 0
    middle += (sizes % 2 == 1) & odd
    left = np.empty_like(there)
    np.put_along_axis(left, order, np.arange(there.shape[1]) < middle[:, None], 1)
    return left


def _only(points: Tensor, there: Bools, which: Bools) -> tuple[Tensor, Bools]:
    """Some of the sets."""
    return (points, there) if which.all() else (points[torch.from_numpy(which)], there[which])
