"""A frozen pretrained network that turns pixels or tokens into features."""

from __future__ import annotations

import hashlib
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from perpetune.data.examples import View
from perpetune.data.sources import Kind
from perpetune.errors import UsageError
from perpetune.models import families
from perpetune.models.taps import Count, Read, Taps, mean_token
from perpetune.pets.base import Place, Slot, frozen, walk
from perpetune.tasks import IGNORED, Inputs

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
        preprocess: the view of its kind of examples: how pictures, or texts, become its input.
        forward: features `(B, dim)` from the net and normalised pixels `(B, 3, H, W)`, or `(B, N, dim)` from the net
            and tokens `(B, N)`; None when the net gives them itself.
        prefix: tokens of a picture before those of its patches.
        class_token: whether the first of them is a class token.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        net: nn.Module,
        *,
        spec: str,
        dim: int,
        preprocess: View,
        forward: Forward | None = None,
        prefix: int = 1,
        class_token: bool = True,
    ):
        super().__init__()
        families.call_linears(net)
        self.net = net.requires_grad_(False).eval()
        self.spec, self.dim, self.preprocess = spec, dim, preprocess
        self.quantised_from: str | None = None  # fingerprint of the float weights, set by whoever quantises
        self.width, self.prefix, self.class_token = dim, prefix, class_token
        self.taps: Taps | None = None
        """Where features are read; None is the net's own feature alone."""
        self._features = forward or call
        for name, tensor in preprocess.constants().items():
            self.register_buffer(name, tensor, persistent=False)
        # Nets that tell order by attention alone have none.
        self.places = preprocess.ordered and "position_ids" in inspect.signature(net.forward).parameters

    def tap(self, count: Count | None, read: Read = "both") -> Backbone:
        """Read features behind the last `count` blocks; None reads the net's own feature. Returns itself.

        With `auto`, a net whose blocks are not known gives its own feature, with a warning.

        Raises:
            UsageError: a net whose blocks are not known, or that has fewer of them or no class token to read.
        """
        try:
            self.taps = None if count is None else Taps(self, count, read)
        except UsageError as error:
            if count != "auto" or read == "class":
                raise
            warnings.warn(f"{error} Its own feature is read instead.", stacklevel=2)
            self.taps = None
        self.dim = self.width * (1 if self.taps is None else self.taps.count * len(self.taps.kinds))
        return self

    @property
    def end(self) -> slice:
        """The columns of the features that are read at the end of the net: all of them without taps."""
        return slice(None) if self.taps is None else slice(self.dim - self.width * len(self.taps.kinds), self.dim)

    @property
    def takes(self) -> Kind:
        """What goes in."""
        return self.preprocess.takes

    def forward(self, inputs: Tensor, **options: Any) -> Tensor:
        """Features `(B, dim)` of normalised pixels `(B, 3, H, W)`, or `(B, N, dim)` of tokens `(B, N)`.

        Args:
            options: for a language model, such as `attention_mask`.
        """
        return self._features(self.net, inputs, **options)

    def features(self, inputs: Inputs | Tensor) -> Tensor:
        """Features `(B, dim)` of uint8 pixels `(B, 3, H, W)`, or of texts: all that reads features asks here.

        Without taps they are the net's own feature of a picture, and of a text the mean over its tokens of the last
        hidden state. With `tap` they are those of `Taps`. At training a text's answer is behind its question, and is
        not read; earlier answers in a chat are part of the question.
        """
        inputs = Inputs.of(inputs)
        if "ids" in inputs:
            mask = inputs.mask if inputs.labels is None else inputs.mask & _before_answer(inputs.labels)
            asked = self.asked(inputs)
            ids = asked.pop("input_ids")
            return self._read(lambda: mean_token(self(ids, **asked), mask), mask)
        pixels = (inputs.pixels.to(self.mean.dtype) / 255 - self.mean) / self.std
        return self._read(lambda: self(pixels), None)

    def _read(self, compute: Callable[[], Tensor], mask: Tensor | None) -> Tensor:
        """What `compute` gives, or what is caught at the taps meanwhile."""
        if self.taps is None:
            return compute()
        with self.taps.listening(self.net) as states:
            compute()
        return self.taps.features(states, mask)

    def asked(self, inputs: Inputs) -> dict[str, Any]:
        """What a language model is given of texts, by keywords."""
        asked: dict[str, Any] = {"input_ids": inputs.ids, "attention_mask": inputs.mask.long()}
        if self.places:
            asked["position_ids"] = positions(inputs.mask)
        return asked

    def train(self, mode: bool = True) -> Backbone:
        """Sets the mode of the PETs; the frozen net stays in evaluation mode.

        Blocks that are to be computed again in the backward pass are the exception, for transformers does that only
        in a block that is in training mode. Nothing else may depend on that mode: `models.loaders.causal_lm` loads
        nets without dropout.
        """
        super().train(mode)
        self.net.eval()
        for _, module in walk(self.net):
            if isinstance(module, Slot):
                module.pets.train(mode)
            elif getattr(module, "gradient_checkpointing", False):
                module.training = mode
        return self

    @property
    def tower(self) -> families.Tower:
        """The transformer whose features are read: of several in the net, the one for what goes in.

        Raises:
            UsageError: a net of unknown family.
        """
        return next(iter(families.towers(self.net, self._answers).values()))

    @property
    def _answers(self) -> families.Reads:
        return "text" if self.takes == "texts" else "picture"

    def roles(self) -> tuple[str, ...]:
        """The roles at which a PET can be put, of another tower than `tower` with its name, as `text.q`.

        Raises:
            UsageError: a net of unknown family.
        """
        return families.roles(self.net, self._answers)

    def pet_places(self, roles: Sequence[str], blocks: Sequence[int] | None = None) -> list[Place]:
        """The places of `roles` in its net: see `families.places`; roles without a tower are those of `tower`."""
        return families.places(self.net, roles, blocks, self._answers)

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
        return f"spec={self.spec!r}, dim={self.dim}, {self.preprocess.extent}"


def positions(mask: Tensor) -> Tensor:
    """The place of each token among those that count, `(B, N)`; 0 at padding before them."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def _before_answer(labels: Tensor) -> Tensor:
    """`(B, N)`, true before the last answer of each text: there a token comes, or is one, that is not learned."""
    return (labels == IGNORED).flip(1).cumsum(1).flip(1) > 0


def triple(spec: str, values: object) -> tuple[float, float, float]:
    """Mean or std of the three channels, from a model's config."""
    if isinstance(values, list | tuple) and len(values) == 3 and all(isinstance(v, int | float) for v in values):
        return float(values[0]), float(values[1]), float(values[2])
    raise UsageError(f"{spec}: mean and std of three channels are expected in its config, not {values!r}")
