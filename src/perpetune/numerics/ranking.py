"""The best of very many rows for each query of a batch, by one product for the whole batch, and a proof for each query.

A score is `q·k + b`, for a query `q` and a row `k` with its offset `b`. `choosing.products` computes the scores of each
query by itself, so that no query depends on its companions. Then all rows are read again for each query, and this takes
most of the time. `Ranking` names the same rows to the last bit, and reads them once:

1. One product of all queries with all rows gives scores whose last bits may depend on the batch.
2. The highest ones are computed again in float64.
3. Adding up in float32, in any order, moves a score by at most `e = D u (‖q‖ ‖k‖ + |b|)`, with the rounding unit `u`
   (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed. 2002, section 3.1). If the rows that are named lie
   further than two such errors above the next ones, `products` would name them too. If not, it is asked, for this query
   alone: so equal scores go by its rule.

Bounds over groups of rows (balls), and bounds from a few numbers of each row (its main directions), were tried: in
features of hundreds of numbers they leave too many rows (docs/results.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from perpetune.numerics.choosing import best, lowest, products

MANY = 3000  # rows; with fewer, `products` alone takes about as long
FEW = 4  # rows beside those that are named whose scores are computed in float64
TABLE = 2**20  # scores in one table: a larger batch is cut, so that its memory does not grow with the rows
TINY = 1e-30  # more than a score loses by products that are too small for float32

Rows = tuple[Tensor, Tensor | None]
"""Rows `(R, D)`, and their offsets `(R,)` or None; −inf is the offset of a row that must not be named."""


class Ranking:
    """Names the rows with the highest scores for each query, and keeps very many rows until they change."""

    def __init__(self) -> None:
        self._sources: list[tuple[Tensor, int]] = []
        self._kept: Ranked | None = None

    def best(
        self,
        queries: Tensor,
        sources: Sequence[Tensor],
        rows: Callable[[], Rows],
        size: int,
        *,
        owners: Tensor | None = None,
        count: int = 1,
        scores: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """What `choosing.best`, or with owners `choosing.lowest`, says of all scores, int64 `(B, k)`.

        Args:
            queries: `(B, D)`.
            sources: the tensors that `rows` depends on. A change of one is noticed if it is another tensor or if torch
                counts it: a change in place by `.data` is not, where there are `MANY` rows.
            rows: makes the rows.
            size: how many there are, `R`.
            owners: int64 `(R,)`, what is named for each row; only with `count` 1.
            count: how many are named, `k`.
            scores: the scores `(B, R)` of the queries with these numbers, if they are not those of `products`. They may
                differ from `q·k + b` by a positive factor, and by rounding as little as those.
        """
        kept = None
        if size >= MANY and not torch.is_grad_enabled() and _in_full():
            on_cpu = all(tensor.device.type == "cpu" and not tensor.is_inference() for tensor in sources)
            kept = self._known(sources, rows) if on_cpu and queries.device.type == "cpu" else None
        whole = rows() if kept is None else kept.rows

        def all_of(which: Tensor) -> Tensor:
            found = _scores(queries[which], *whole) if scores is None else scores(which)
            return best(found, count) if owners is None else lowest(found, owners)[:, None]

        if kept is None or len(queries) < 2 or size <= count + FEW:
            return all_of(torch.arange(len(queries), device=queries.device))
        found, proved = kept.highest(queries, count)
        found = found if owners is None else owners[found]
        if not proved.all():
            doubtful = (~proved).nonzero()[:, 0]
            found[doubtful] = all_of(doubtful)
        return found

    def _known(self, sources: Sequence[Tensor], rows: Callable[[], Rows]) -> Ranked:
        same = len(self._sources) == len(sources) and all(
            old.data_ptr() == new.data_ptr() and old.shape == new.shape and version == new._version
            for (old, version), new in zip(self._sources, sources, strict=True)
        )
        if self._kept is None or not same:
            self._kept = Ranked(*rows())
            # An alias holds the memory, so that no other tensor gets the same address.
            self._sources = [(source.detach(), source._version) for source in sources]
        return self._kept


class Ranked:
    """Rows `(R, D)` with offsets `(R,)`, and what bounds the rounding of their scores."""

    def __init__(self, rows: Tensor, offset: Tensor | None):
        self.rows: Rows = (rows, offset)
        self._reach = float(torch.linalg.vector_norm(rows, dim=1).amax())
        self._shift = 0.0 if offset is None else float(offset.masked_fill(offset.isneginf(), 0).abs().amax())

    def highest(self, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Numbers of the rows with the highest scores, `(B, k)`, and for which queries this is proved, `(B,)`."""
        parts = [self._highest(some, count) for some in queries.split(max(1, TABLE // len(self.rows[0])))]
        numbers, proved = zip(*parts, strict=True)
        return torch.cat(numbers), torch.cat(proved)

    def _highest(self, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
        rows, offset = self.rows
        scores = (rows @ queries.mT).mT.contiguous()  # half the time of `queries @ rows.mT`
        top = (scores if offset is None else scores.add_(offset)).topk(count + FEW)
        near = torch.bmm(rows[top.indices].double(), queries.double()[:, :, None])[:, :, 0]
        near, order = (near if offset is None else near + offset[top.indices]).sort(dim=1, descending=True)
        error, small = (self._error(queries, dtype) for dtype in (rows.dtype, torch.float64))
        # The next ones: of those that were computed again, and of all others.
        others = torch.cat([near[:, 1 : count + 1], top.values[:, -1:] + error], dim=1)
        named = torch.cat([near[:, :count], near[:, count - 1 : count]], dim=1)
        proved = (named - others > 2 * (error + small)).all(1)  # false where something is no number
        return top.indices.gather(1, order)[:, :count], proved

    def _error(self, queries: Tensor, dtype: torch.dtype) -> Tensor:
        """The most by which rounding moves a score, `(B, 1)`: of its products and sums, with room for a few more."""
        unit = torch.finfo(dtype).eps / 2
        norms = torch.linalg.vector_norm(queries.double(), dim=1, keepdim=True)
        error: Tensor = 1.01 * (queries.shape[1] + 8) * unit * (norms * self._reach + self._shift) + TINY
        return error


def _scores(queries: Tensor, rows: Tensor, offset: Tensor | None) -> Tensor:
    scores = products(queries, rows)
    return scores if offset is None else scores + offset


def _in_full() -> bool:
    """Whether a product of float32 matrices is computed in float32: people can let torch round its factors."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # torch's newer switches are in use, and it cannot say in the words of the older one
        return False
