"""The pet `ssf`: a scale and a shift after single operations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from perpetune.errors import UsageError
from perpetune.numerics.projection import Site
from perpetune.pets.base import PET, Conditions, Place, is_plain, with_values
from perpetune.pets.choice import Choice


class SSF(PET):
    """A scale and a shift after an operation, `y = (1 + δ) ⊙ base(x) + β`; Lian et al. 2022, arXiv:2210.08823.

    The operation is a linear layer, a norm, or the convolution that embeds patches. `δ` and `β` are `(c,)`, one number
    for each output channel. In a fused qkv only the rows of the named roles are scaled. The paper's scale is
    `γ = 1 + δ`; the pet stores `δ`, so that weight decay pulls the scale to 1 and not to 0. Timm's EVA and BEiT add the
    biases of q and v after the fused layer, so those biases are not scaled. `fold` writes scale and shift into a copy
    of the frozen operation.

    Args:
        std: the standard deviation of the initial `δ` and `β`. The paper uses 0.02, which changes the pretrained model
            slightly at the start; 0 starts at the pretrained model itself.

    Raises:
        UsageError: an option is out of range, or the place is not a single operation.
    """

    compiles = True
    default_at: ClassVar[tuple[str, ...]] = ("operations",)
    rows: Tensor | None

    def __init__(self, place: Place, generator: torch.Generator, *, std: float = 0.0):
        super().__init__()
        if place.roles[0] in ("attn", "mlp", "block"):
            where = f"{place.path} ({', '.join(place.roles)})"
            raise UsageError(f"ssf: {where} is not a single operation; use operations, or roles such as norm1, q, fc1")
        if not (std >= 0 and math.isfinite(std)):
            raise UsageError(f"ssf: std is {std}; a number from 0 is expected")
        self.d_out, self.of_maps = place.d_out, isinstance(place.module, nn.Conv2d)
        rows = torch.cat([torch.arange(*part) for part in place.parts or ((0, place.d_out),)])
        self.register_buffer("rows", rows if len(rows) < place.d_out else None, persistent=False)
        self.scale = nn.Parameter(torch.randn(len(rows), generator=generator) * std)
        self.shift = nn.Parameter(torch.randn(len(rows), generator=generator) * std)

    def forward(self, base: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = base(x, *args, **kwargs)  # (..., d_out), or (B, d_out, H, W) after a convolution
        gain, shift = self._gain(), self._on_rows(self.shift)
        if self.of_maps:
            gain, shift = gain[..., None, None], shift[..., None, None]
        elif gain.dim() == 2:  # each example has its own scale, and may have several rows
            rows = y.reshape(len(gain), -1, y.shape[-1])
            return torch.addcmul(shift[:, None], rows, gain[:, None]).view(y.shape).to(y.dtype)
        return torch.addcmul(shift, y, gain).to(y.dtype)

    def blend(self, members: Sequence[PET], choice: Choice) -> dict[str, Tensor]:
        """For one example, the `δ` of its members are added, and so are their `β`."""
        pets = [pet for pet in members if isinstance(pet, SSF)]
        return {
            "scale": choice.summed([pet.scale for pet in pets]),
            "shift": choice.summed([pet.shift for pet in pets]),
        }

    def fold(self, base: nn.Module) -> nn.Module | None:
        """A linear layer, convolution or LayerNorm with weight `(1 + δ) W` and bias `(1 + δ) b + β`."""
        if not (is_plain(base, nn.Linear) or is_plain(base, nn.Conv2d) or isinstance(base, nn.LayerNorm)):
            return None
        gain, shift = self._gain(), self._on_rows(self.shift)
        values = dict(base.named_parameters(recurse=False))  # a LayerNorm may have neither weight nor bias
        weight, bias = values.get("weight"), values.get("bias")
        return with_values(
            base,
            gain if weight is None else gain.view(-1, *[1] * (weight.dim() - 1)) * weight,
            shift if bias is None else gain * bias + shift,
        )

    def sites(self, conditions: Conditions = "exact") -> list[Site]:
        """Raise UsageError, because an `ssf` cannot be protected.

        Each scale multiplies one number. As soon as one old row has a number other than 0 there, no change of the
        scale keeps the old output.
        """
        raise UsageError(
            "ssf cannot be protected: every change of a scale or shift changes old outputs; "
            "leave protect: out, or use lora or adapter"
        )

    def _gain(self) -> Tensor:
        """`1 + δ (d_out,)`, or `(B, d_out)` if each example has its own."""
        return self._on_rows(self.scale) + 1

    def _on_rows(self, values: Tensor) -> Tensor:
        """`(…, d_out)`: the values in the rows that the pet scales, 0 in all others."""
        if self.rows is None:
            return values
        return values.new_zeros(*values.shape[:-1], self.d_out).index_copy(-1, self.rows, values)

    def extra_repr(self) -> str:
        return f"d_out={self.d_out}, rows={len(self.scale)}"
