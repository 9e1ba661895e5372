"""A frozen pretrained network that turns pixels or tokens into features."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from perpetune.errors import UsageError
from perpetune.models import families
from perpetune.models.preprocess import Preprocess
from perpetune.models.texts import TextView
from perpetune.pets.base import Slot, frozen, walk

Forward = Callable[..., Tensor]
"""`(net, inputs)` to features; that of a language model also takes keywords such as `attention_mask`."""


def call(net: nn.Module, pixels: Tensor) -> Tensor:
    """Features of a net that gives them when it is called."""
    features: Tensor = net(pixels)
    return features


class Backbone(nn.Module):
    """A pretrained net whose own parameters never change; what is trained are the PETs injected into it.

    Args:
        net: the net. Its parameters are frozen here, and it stays in evaluation mode; PETs inside it
            follow `train()` and `eval()` as usual.
        spec: how a recipe names it.
        dim: width of the features.
        preprocess: how pictures, or texts, become its input.
        forward: features `(B, dim)` from the net and normalised pixels `(B, 3, H, W)`, or `(B, N, dim)` from the net
            and tokens `(B, N)`; None when the net gives them itself.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        spec: str,
        dim: int,
        preprocess: Preprocess | TextView,
        forward: Forward | None = None,
    ):
        super().__init__()
        families.call_linears(net)
        self.net = net.requires_grad_(False).eval()
        self.spec, self.dim, self.preprocess = spec, dim, preprocess
        self.quantised_from: str | None = None  # fingerprint of the float weights, set by whoever quantises
        self._features = forward or call

    @property
    def takes(self) -> Literal["pictures", "texts"]:
        """What goes in."""
        return "texts" if isinstance(self.preprocess, TextView) else "pictures"

    def forward(self, inputs: Tensor, **options: Any) -> Tensor:
        """Features `(B, dim)` of normalised pixels `(B, 3, H, W)`, or `(B, N, dim)` of tokens `(B, N)`.

        Args:
            options: for a language model, such as `attention_mask`.
        """
        return self._features(self.net, inputs, **options)

    def train(self, mode: bool = True) -> Backbone:
        """Sets the mode of the PETs; the frozen net stays in evaluation mode.

        Blocks that are to be computed again in the backward pass are the exception, for transformers does that only
        in a block that is in training mode. Nothing else may depend on that mode: `models.language` loads nets
        without dropout.
        """
        super().train(mode)
        self.net.eval()
        for _, module in walk(self.net):
            if isinstance(module, Slot):
                module.pets.train(mode)
            elif getattr(module, "gradient_checkpointing", False):
                module.training = mode
        return self

    def roles(self) -> tuple[str, ...]:
        """The roles at which a PET can be put; UsageError for a net of unknown family."""
        return families.roles(self.net)

    def fingerprint(self) -> str:
        """SHA-256 over names, dtypes, shapes and bytes of the frozen tensors; PETs do not enter.

        For a net held in 4 bits it is that of the weights before they were quantised, for bitsandbytes
        packs them differently on each device.
        """
        if self.quantised_from is not None:
            return self.quantised_from
        digest = hashlib.sha256()
        for name, tensor in sorted(frozen(self.net).items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def extra_repr(self) -> str:
        view = self.preprocess
        size = f"max_length={view.max_length}" if isinstance(view, TextView) else f"size={view.size}"
        return f"spec={self.spec!r}, dim={self.dim}, {size}"


def triple(spec: str, values: object) -> tuple[float, float, float]:
    """Mean or std of the three channels, from a model's config."""
    if isinstance(values, list | tuple) and len(values) == 3 and all(isinstance(v, int | float) for v in values):
        return float(values[0]), float(values[1]), float(values[2])
    raise UsageError(f"{spec}: mean and std of three channels are expected in its config, not {values!r}")
