"""The memory of one site: its protected subspaces and the sums that the certificate needs. It stores no data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from perpetune.numerics.drift import Drift, ProductDrift
from perpetune.numerics.lowrank import Factors
from perpetune.numerics.subspace import Subspace


class SiteMemory(nn.Module):
    """The subspaces of a site, one for each head, and the drift of its outputs, as buffers that can be stored.

    All tensors are float64 on the CPU, wherever the model is: eigenvectors of second moments need float64, and Apple's
    GPUs do not have it.

    Args:
        heads, out, dim: the operand's shape.
        alpha: the `alpha` of soft subspaces; None for hard ones.
        rows: the number of rows of a product `(rows, dim)`, if the site measures the product of which its operand is a
            factor; None if it measures the operand.
    """

    vectors: Tensor
    importance: Tensor
    total: Tensor
    last: Tensor
    cross: Tensor

    def __init__(self, heads: int, out: int, dim: int, alpha: float | None = None, rows: int | None = None):
        super().__init__()
        self.shape, self.alpha, self.rows = (heads, out, dim), alpha, rows
        new = Drift(heads, out, dim) if rows is None else ProductDrift(rows, dim)
        for name in ("total", "last", "cross"):
            self.register_buffer(name, getattr(new, name))
        self.figures = {"change": 0.0, "output": 0.0, "count": 0}
        self.forms: list[tuple[int, bool]] = []  # for each head: stored columns, and whether they span the complement
        self.register_buffer("vectors", torch.empty(0))
        self.register_buffer("importance", torch.empty(0))
        self.subspaces = [Subspace(dim, alpha) for _ in range(heads)]

    @property
    def subspaces(self) -> list[Subspace]:
        """The subspaces of the heads, as a new list. To change them, assign a list."""
        subspaces = []
        columns = self.vectors.split([count for count, _ in self.forms], dim=1)
        weights = self.importance.split([count if self.alpha is not None else 0 for count, _ in self.forms])
        for (_, complement), vectors, importance in zip(self.forms, columns, weights, strict=True):
            subspace = Subspace(self.shape[2], self.alpha)
            subspace.vectors, subspace.complement, subspace.importance = vectors, complement, importance
            subspaces.append(subspace)
        return subspaces

    @subspaces.setter
    def subspaces(self, subspaces: Sequence[Subspace]) -> None:
        self.forms = [(s.vectors.shape[1], s.complement) for s in subspaces]
        self.vectors = torch.cat([s.vectors for s in subspaces], dim=1)
        self.importance = torch.cat([s.importance for s in subspaces])

    @property
    def rank(self) -> int:
        """The number of protected directions over all heads."""
        return sum(s.rank for s in self.subspaces)

    @property
    def room(self) -> float:
        """The share of free directions over all heads."""
        heads, _, dim = self.shape
        return 1 - self.rank / (heads * dim)

    @property
    def drift(self) -> Drift:
        """The drift of the operand's outputs, as a view of the buffers. `learned` advances it."""
        drift = Drift.__new__(Drift)
        self._into(drift)
        return drift

    @property
    def product_drift(self) -> ProductDrift:
        """The drift of the product's outputs, if a product is measured, as a view of the buffers."""
        drift = ProductDrift.__new__(ProductDrift)
        assert self.rows is not None
        drift.out = self.rows
        self._into(drift)
        return drift

    def _into(self, drift: Drift) -> None:
        drift.dim, drift.total, drift.last, drift.cross = self.shape[2], self.total, self.last, self.cross
        drift.change, drift.output = self.figures["change"], self.figures["output"]
        drift.count = int(self.figures["count"])

    def measure(self, *values: Tensor) -> tuple[float, float | None]:
        """Change and relative change of the old outputs if the present values are `values (heads, out, m)`, or the two
        factors of a product. The relative change is None if there are no old outputs."""
        if self.rows is None:
            return self.drift.measure(*values)
        b, a = values
        return self.product_drift.measure_product((b, a))

    def learned(self, values: Tensor, moments: Tensor, count: int, usual: Tensor | None = None) -> None:
        """Add data with `moments (heads, m, m)`, which were learned with `values (heads, out, m)`.

        Args:
            usual: values whose outputs serve as the measure for changes. Used for an idle site that was moved into the
                free directions, because its own outputs are nearly zero.
        """
        drift = self.drift
        drift.advance(values, moments, count)
        if usual is not None:
            drift.output += float(((usual @ moments) * usual).sum() - ((values @ moments) * values).sum())
        self._from(drift)

    def learned_product(self, values: Factors, moments: Tensor, count: int) -> None:
        """As `learned`, for the factors of a product."""
        drift = self.product_drift
        drift.advance_product(values, moments, count)
        self._from(drift)

    def _from(self, drift: Drift) -> None:
        self.last, self.cross = drift.last, drift.cross
        self.figures = {"change": drift.change, "output": drift.output, "count": drift.count}

    def make_room(self, out: int) -> None:
        """Set the number of rows of the operand, as long as it had none."""
        heads, _, dim = self.shape
        self.shape = (heads, out, dim)
        self.last, self.cross = self.last.new_zeros(self.shape), self.cross.new_zeros(self.shape)

    def get_extra_state(self) -> dict[str, Any]:
        about = {"shape": list(self.shape), "forms": [list(form) for form in self.forms], "figures": self.figures}
        return about if self.rows is None else {**about, "terms": [len(self.last), len(self.cross)]}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        heads, out, dim = (int(n) for n in state["shape"])
        if (heads, dim) == (self.shape[0], self.shape[2]) and out != self.shape[1] and 0 in (out, self.shape[1]):
            self.make_room(out)
        if (heads, out, dim) != self.shape:
            raise ValueError(f"the site has shape {self.shape} in the model and {tuple(state['shape'])} in the state")
        self.forms = [(int(count), bool(complement)) for count, complement in state["forms"]]
        self.figures = dict(state["figures"])
        columns = sum(count for count, _ in self.forms)
        shapes = {"vectors": (self.shape[2], columns), "importance": (columns if self.alpha is not None else 0,)}
        if self.rows is not None:
            last, cross = state["terms"]
            width = self.rows + self.shape[2]
            shapes |= {"last": (int(last), width), "cross": (int(cross), width)}
        for name, shape in shapes.items():
            if getattr(self, name).shape != shape:  # torch also calls this after it has loaded the tensors; keep them
                setattr(self, name, torch.zeros(shape, dtype=torch.float64))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if (state := state_dict.get(f"{prefix}_extra_state")) is not None:
            self.set_extra_state(state)  # this gives the buffers their shapes
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SiteMemory:
        return self
