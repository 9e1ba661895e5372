"""The backbone: a frozen pretrained network that turns pixels or tokens into features."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from perpetune.data.examples import View
from perpetune.data.pictures.view import PictureView
from perpetune.data.sources import Kind
from perpetune.data.texts.view import TextView
from perpetune.errors import UsageError, out_of_memory
from perpetune.models.families import Reads
from perpetune.models.keeping import Keeper
from perpetune.models.picture_side import PictureSide
from perpetune.models.taps import Count, Read, Taps, mean_token, until_block
from perpetune.models.text_side import PROBES, TextSide
from perpetune.models.towers import Tower, call_linears, places, roles, towers
from perpetune.pets.base import Place, Slot, frozen, walk
from perpetune.tasks import IGNORED, Inputs

if TYPE_CHECKING:
    from perpetune.models.sharded import Sharded

Forward = Callable[..., Tensor]
"""A function from `(net, inputs)` to features. For a language model it also takes keywords such as `attention_mask`."""

FEW = 4
"""Pictures that a CPU normalises at once: of 224 pixels a side, what its cache holds. A whole batch would go through
memory in each of four steps."""


def call(net: nn.Module, pixels: Tensor | None) -> Tensor:
    """Features of a net whose output is the features."""
    features: Tensor = net(pixels)
    return features


class Backbone(nn.Module):
    """A pretrained net whose own parameters never change. Only the PETs injected into it are trained.

    Args:
        net: the net. Its parameters are frozen here, and it stays in evaluation mode; PETs inside it
            follow `train()` and `eval()` as usual.
        spec: the name of the backbone in a recipe.
        dim: width of the features.
        preprocess: the view of its kind of examples; it turns pictures or texts into the net's input.
        forward: computes features `(B, dim)` from the net and normalised pixels `(B, 3, H, W)`, or `(B, N, dim)` from
            the net and tokens `(B, N)`; None if the net's output is the features.
        prefix: the number of tokens before those of the patches of a picture.
        class_token: whether the first of these tokens is a class token.
        width: width of the tokens after a block; None if that is `dim`. In a dual encoder the features are projected.
        texts: what reads texts in a dual encoder; its tower is part of `net`.
        pictures: what reads the pictures in the texts of a vision-language model; its tower is part of `net`.
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
        width: int | None = None,
        texts: TextSide | None = None,
        pictures: PictureSide | None = None,
    ):
        super().__init__()
        call_linears(net)
        self.net = net.requires_grad_(False).eval()
        self.spec, self.dim, self.preprocess = spec, dim, preprocess
        self.quantised_from: str | None = None  # fingerprint of the float weights; set by the code that quantises
        self.width, self.prefix, self.class_token = width or dim, prefix, class_token
        self.own = dim
        """The width of the net's own feature."""
        self.texts = texts
        """The text side of a dual encoder: its features have the space of the net's own feature. Else None."""
        self.pictures = pictures
        """The picture side of a vision-language model; else None."""
        self.opens: dict[str, Any] = {}
        """How its library opens the same net, for an export: `library`, `base`, and keywords of the constructor
        (`options`) and of each call (`call`). Empty if the loader does not say it."""
        self.keeper: Keeper | None = None
        """What is asked first for features that it may have kept; None while nothing is."""
        self.sharded: Sharded | None = None
        """What other processes hold a part of, with `run.shard`; None if this one holds the whole net."""
        self.taps: Taps | None = None
        """The blocks whose tokens are read as features; None means the net's own feature alone."""
        self._features = forward or call
        for name, tensor in preprocess.constants().items():
            self.register_buffer(name, tensor, persistent=False)
        # Some nets know the order of tokens from attention alone; their `forward` takes no positions.
        self.places = preprocess.ordered and "position_ids" in inspect.signature(net.forward).parameters

    def tap(self, count: Count | None, read: Read = "both") -> Backbone:
        """Read features after the last `count` blocks; None reads the net's own feature. Returns the backbone itself.

        In a dual encoder the net's own feature, the one that is compared with texts, stands before those of the taps.
        With `auto`, the net's own feature is read if its blocks are not known, with a warning.

        Raises:
            UsageError: the blocks of the net are not known, the net has fewer blocks, or it has no class token to read.
        """
        try:
            self.taps = None if count is None else Taps(self, count, read)
        except UsageError as error:
            if count != "auto" or read == "class":
                raise
            warnings.warn(f"{error} Its own feature is read instead.", stacklevel=2)
            self.taps = None
        beside = self.own if self.texts is not None else 0
        self.dim = self.own if self.taps is None else beside + self.width * self.taps.count * len(self.taps.kinds)
        return self

    @torch.no_grad()
    def check(self) -> None:
        """Pass one empty example through the net, so that parts that do not fit each other are named before learning.

        Raises:
            UsageError: the net cannot read what its view makes, or gives features of another width or not finite ones.
        """
        inputs = self.empty()
        if inputs is None:
            return
        try:
            features = self.features(inputs)
        except Exception as error:
            if isinstance(error, RuntimeError) and out_of_memory(error):
                raise
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise UsageError(
                f"{self.spec}: the model cannot read {self.takes} ({reason}): its parts do not fit each other; look at "
                "channels, image size, heads and vocabulary in its config"
            ) from error
        if features.shape[-1] != self.dim:
            raise UsageError(f"{self.spec}: its features have {features.shape[-1]} numbers; {self.dim} are expected")
        if not features.isfinite().all():
            raise UsageError(f"{self.spec}: its features are not finite numbers: the checkpoint is damaged")
        if self.texts is not None:
            self._check_texts(self.texts)

    def _check_texts(self, texts: TextSide) -> None:
        try:
            features = texts.of(PROBES)
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            if isinstance(error, RuntimeError) and out_of_memory(error):
                raise
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise UsageError(
                f"{self.spec}: the text tower cannot read texts ({reason}): look at its config and tokenizer"
            ) from error
        if features.shape[1] != self.own:
            raise UsageError(
                f"{self.spec}: features of texts have {features.shape[1]} numbers and those of pictures {self.own}: "
                "they cannot be compared"
            )
        if not features.isfinite().all():
            raise UsageError(f"{self.spec}: features of texts are not finite numbers: the checkpoint is damaged")

    def empty(self) -> Inputs | None:
        """One example of the view without content; None if the view is of an unknown kind."""
        device = self.device
        if isinstance(self.preprocess, TextView):
            ids = torch.full((1, 2), self.preprocess.pad, device=device)
            return Inputs(ids=ids, mask=torch.ones_like(ids, dtype=torch.bool))
        if isinstance(self.preprocess, PictureView):
            side = self.preprocess.size
            return Inputs(pixels=torch.zeros(1, 3, side, side, dtype=torch.uint8, device=device))
        return None

    @property
    def device(self) -> torch.device:
        """The device of the net."""
        return next((t.device for t in self.net.parameters()), torch.device("cpu"))

    @property
    def end(self) -> slice:
        """The columns of the features that come from the end of the net; without taps all columns."""
        if self.taps is None:
            return slice(None)
        if self.texts is not None:
            return slice(self.own)
        return slice(self.dim - self.width * len(self.taps.kinds), self.dim)

    def compared(self, features: Tensor) -> Tensor:
        """The columns `(B, own)` of features `(B, D)` that a dual encoder compares with texts."""
        return features[:, : self.own]

    @property
    def takes(self) -> Kind:
        """The kind of examples that the backbone takes: pictures, texts, or texts with pictures (`pictured`)."""
        return self.preprocess.takes

    def forward(self, inputs: Tensor | None, **options: Any) -> Tensor:
        """Features `(B, dim)` of normalised pixels `(B, 3, H, W)`, or `(B, N, dim)` of tokens `(B, N)`.

        Args:
            inputs: None if `options` has the embeddings of the tokens.
            options: keywords for a language model, such as `attention_mask`.
        """
        return self._features(self.net, inputs, **options)

    def features(self, inputs: Inputs | Tensor) -> Tensor:
        """Features `(B, dim)` of uint8 pixels `(B, 3, H, W)`, or of texts. All code that needs features calls this.

        Without taps the feature of a picture is the net's own, and the feature of a text is the mean of the last hidden
        states of its tokens. After `tap` the features are those of `Taps`. In training a text contains its answer after
        the question; the answer is not read. Earlier answers in a chat belong to the question.
        """
        read = "own" if self.taps is None else f"taps {self.taps.count} {self.taps.kinds}"
        inputs = Inputs.of(inputs)

        def computed() -> Tensor:
            mask, compute = self._computed(inputs)
            return self._read(compute, mask)

        return self._found(f"features {read}", inputs, computed)

    def _found(self, what: str, inputs: Inputs, compute: Callable[[], Tensor]) -> Tensor:
        """What the keeper has of these inputs, or the result of `compute`.

        Args:
            what: what is read of the net.
        """
        if self.keeper is None or self.pictures is not None:  # a projector may be trained beside the pets
            return compute()
        kind = self.device.type
        cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else "full"
        return self.keeper(f"{what} {cast}", inputs, compute)

    def _computed(self, inputs: Inputs) -> tuple[Tensor | None, Callable[[], Tensor]]:
        """For texts `(B, N)`, true for the tokens that are read, else None; and what computes the net's own feature."""
        if "ids" in inputs:
            mask = inputs.mask if inputs.labels is None else inputs.mask & _before_answer(inputs.labels)
            arguments = self.asked(inputs)
            ids = arguments.pop("input_ids", None)
            return mask, lambda: mean_token(self(ids, **arguments), mask)
        pixels = self.normalised(inputs.pixels)
        return None, lambda: self(pixels)

    def normalised(self, pixels: Tensor) -> Tensor:
        """Pixels `(B, 3, H, W)` as the net takes them, from uint8."""
        traced = torch.compiler.is_compiling()  # a graph is for batches of any size
        if pixels.device.type == "cpu" and pixels.dtype == torch.uint8 and not traced:
            floats = torch.empty_like(pixels, dtype=self.mean.dtype)
            for few, given in zip(floats.split(FEW), pixels.split(FEW), strict=True):
                self._normalise(few.copy_(given))
            return floats
        floats = pixels.to(self.mean.dtype)
        if floats is pixels:  # floats already, and the caller's
            floats = floats.clone()
        return self._normalise(floats)

    def _normalise(self, floats: Tensor) -> Tensor:
        """In place: new memory for a batch takes longer than the division."""
        return floats.div_(255).sub_(self.mean).div_(self.std)

    def query(self, inputs: Inputs | Tensor, after: int | None = None) -> Tensor:
        """Features `(B, width)`, float32, by which a selector chooses members: of the net's end, without taps.

        Args:
            after: the number of blocks to compute; the tokens behind them are read and the rest of the net is not
                computed. They pass a layer norm without scale and shift; then the class token is read, or the mean of
                the patches if the net has none, and of a text the mean of its tokens. None computes the whole net.

        Raises:
            UsageError: the blocks of the net are not known, or it has fewer than `after`.
        """
        inputs = Inputs.of(inputs)

        def computed() -> Tensor:
            mask, compute = self._computed(inputs)
            return compute().float() if after is None else until_block(self, after, compute, mask)

        return self._found(f"query {after}", inputs, computed)

    def _read(self, compute: Callable[[], Tensor], mask: Tensor | None) -> Tensor:
        """The result of `compute`, or with taps the features of the tokens that the taps catch while it runs."""
        if self.taps is None:
            return compute()
        with self.taps.listening(self.net) as states:
            own = compute()
        tapped = self.taps.features(states, mask)
        return tapped if self.texts is None else torch.cat([own.to(tapped.dtype), tapped], dim=-1)

    def asked(self, inputs: Inputs) -> dict[str, Any]:
        """The keyword arguments with which a language model is called for these texts."""
        read: dict[str, Any] = {"input_ids": inputs.ids}
        if self.pictures is not None:
            read = self.pictures.asked(self.net, inputs, self.normalised)
        arguments = {**read, "attention_mask": inputs.mask.long()}
        if self.places:
            arguments["position_ids"] = self.positions(inputs.ids, inputs.mask)
        return arguments

    def positions(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The positions of tokens `(B, N)` as the net takes them: `(B, N)`, or `(3, B, N)` where it has three axes."""
        if self.pictures is not None and self.pictures.grid is not None:
            return self.pictures.positions(ids, mask)
        return positions(mask)

    def train(self, mode: bool = True) -> Backbone:
        """Set the mode of the PETs; the frozen net stays in evaluation mode.

        Blocks with gradient checkpointing are the exception: transformers computes a block again in the backward pass
        only if the block is in training mode. Nothing else may depend on that mode, so `models.loaders.causal_lm`
        loads nets without dropout.
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
    def tower(self) -> Tower:
        """The transformer whose features are read. If the net has several, it is the one for the kind of examples.

        Raises:
            UsageError: the net belongs to no known family.
        """
        found = towers(self.net, self._answers)
        if self.texts is not None and self._answers not in found:
            raise UsageError(
                f"{self.spec}: the parts of its picture tower are not known; name the tower for texts, as in `text.q`"
            )
        return next(iter(found.values()))

    @property
    def _answers(self) -> Reads:
        return "picture" if self.takes == "pictures" else "text"

    def roles(self) -> tuple[str, ...]:
        """The roles at which a PET can be put. Roles of towers other than `tower` have the tower's name: `text.q`.

        Raises:
            UsageError: the net belongs to no known family.
        """
        return roles(self.net, self._answers)

    def pet_places(self, roles: Sequence[str], blocks: Sequence[int] | None = None) -> list[Place]:
        """The places of `roles` in the net; see `towers.places`. A role without a tower's name belongs to `tower`."""
        if self.texts is not None and not all("." in role for role in roles):
            _ = self.tower  # a role without a tower's name may not go to the texts
        found = places(self.net, roles, blocks, self._answers)
        words = getattr(self.texts, "words", None)  # another package's text side need not have it
        return [dataclasses.replace(place, words=words) if place.roles == ("embed",) else place for place in found]

    def whole(self, module: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Inside this context the parameters of a frozen module are whole, for code that reads them and does not call
        the module. With `run.shard` all processes send their shares of it."""
        return contextlib.nullcontext() if self.sharded is None else self.sharded.whole(module)

    def fingerprint(self) -> str:
        """SHA-256 over names, dtypes, shapes and bytes of the frozen tensors, without those of PETs, and over the
        tokens that a dual encoder makes of texts.

        For a net in 4 bits the digest is that of the weights before they were quantised, because bitsandbytes packs
        them differently on each device.
        """
        if self.quantised_from is not None:
            return self.quantised_from
        digest = hashlib.sha256()
        named = sorted(frozen(self.net).items()) if self.sharded is None else self.sharded.tensors(self.net)
        for name, tensor in named:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        if self.texts is not None:
            digest.update(self.texts.fingerprint().encode())
        return digest.hexdigest()

    def extra_repr(self) -> str:
        return f"spec={self.spec!r}, dim={self.dim}, {self.preprocess.extent}"


def positions(mask: Tensor) -> Tensor:
    """The position `(B, N)` of each token, counted without padding; 0 at padding before the text."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def _before_answer(labels: Tensor) -> Tensor:
    """`(B, N)`, true for the tokens before the last answer of each text: up to the last token that is not learned."""
    return (labels == IGNORED).flip(1).cumsum(1).flip(1) > 0


def triple(spec: str, values: object) -> tuple[float, float, float]:
    """Mean or std of the three channels, from a model's config.

    Raises:
        UsageError: the values are not three numbers.
    """
    if isinstance(values, list | tuple) and len(values) == 3 and all(isinstance(v, int | float) for v in values):
        return float(values[0]), float(values[1]), float(values[2])
    raise UsageError(f"{spec}: its config gives {values!r} as mean or std; three numbers, one a channel, are expected")
