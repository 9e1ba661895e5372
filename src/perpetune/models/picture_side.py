"""The picture side of a vision-language model: pixels in, states that stand in the place of tokens out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from perpetune.numerics.handover import Late, sent
from perpetune.pets.base import Slot, slots
from perpetune.pets.choice import Choice
from perpetune.tasks import Inputs

States = Callable[[Any, Tensor], Tensor]
"""From `(net, normalised pixels (P, 3, H, W))` to the states `(P, m, D)` that the projector reads."""

ROOM = 1 << 30
"""Most bytes of states that are kept in memory, if nobody says otherwise."""


class PictureSide:
    """The part of a `Backbone` that reads pictures beside texts. It owns no parameters: they belong to the net.

    While no pet acts in the tower, the states of a picture never change. They are computed once, for each picture
    alone, so that they have the same bits whatever stands beside it, and kept in main memory.

    Args:
        token: the token that stands `count` times where a picture stands.
        count: the number of states of one picture.
        tower: computes the states.
        path: where the tower lies in the net.
        projector: where the module lies that turns states into embeddings of tokens; None if the tower does that.
        drawn: whether the weights of the projector are random.
        grid: where tokens have positions in three axes, the side of a picture in tokens; else None.
        mutual: whether the tokens of a question see each other both ways, as in PaliGemma.
    """

    def __init__(
        self,
        *,
        token: int,
        count: int,
        tower: States,
        path: str,
        projector: str | None,
        drawn: bool = False,
        grid: int | None = None,
        mutual: bool = False,
    ):
        self.token, self.count, self.path, self.projector = token, count, path, projector
        self.drawn, self.grid, self.mutual, self.room = drawn, grid, mutual, ROOM
        self._tower = tower
        self._kept: dict[int, Late] = {}
        self._bytes = 0
        self._trained: nn.Module | None = None

    @contextlib.contextmanager
    def projecting(self, projector: nn.Module | None) -> Iterator[None]:
        """Inside this context `projector` takes the place of the net's own; None leaves that in its place."""
        before, self._trained = self._trained, projector
        try:
            yield
        finally:
            self._trained = before

    def asked(self, net: Any, inputs: Inputs, normalise: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """The keyword arguments that say to a net what it reads: tokens, or embeddings where there are pictures."""
        ids, labels = inputs.ids, inputs.labels
        more: dict[str, Tensor] = {}
        if self.mutual:
            answered = torch.zeros_like(ids) if labels is None else (labels >= 0).long().cummax(1).values
            more["token_type_ids"] = answered
        if "pixels" not in inputs:
            return {"input_ids": ids, **more}
        there = (ids == self.token) & inputs.mask
        embedded: Tensor = net.get_input_embeddings()(ids.masked_fill(there, 0))  # the table may have no row for it
        features = self.features(net, inputs, normalise).to(embedded.dtype)  # (P, count, W)
        # The places in their order. Their number is known, so the device need not be asked for it.
        places = (~there).flatten().to(torch.uint8).argsort(stable=True)[: features.shape[0] * features.shape[1]]
        filled = embedded.flatten(0, 1).index_copy(0, places, features.flatten(0, 1))
        return {"inputs_embeds": filled.view_as(embedded), **more}

    def features(self, net: Any, inputs: Inputs, normalise: Callable[[Tensor], Tensor]) -> Tensor:
        """Embeddings `(P, count, W)` of the pictures of all examples, in their order."""
        keys = inputs["shown"].cpu()
        there = (keys != 0).nonzero()  # (P, 2)
        pixels = inputs.pixels.flatten(0, 1)
        pixels = pixels[sent(there[:, 0] * keys.shape[1] + there[:, 1], pixels.device)]
        known = keys[keys != 0].tolist()
        tower: nn.Module = net.get_submodule(self.path)
        acting = [slot for _, slot in slots(tower) if slot.active is not None]
        if acting:
            with _of_examples(acting, there[:, 0]):
                states = self._tower(net, normalise(pixels))
        elif self.room:
            states = self._once(net, pixels, known, normalise)
        else:
            with torch.no_grad():
                states = self._tower(net, normalise(pixels))
        if self.projector is None:
            return states
        projector = self._trained or net.get_submodule(self.projector)
        wanted = next((p.dtype for p in projector.parameters()), states.dtype)
        projected: Tensor = projector(states.to(wanted))
        return projected

    @torch.no_grad()
    def _once(self, net: Any, pixels: Tensor, keys: Sequence[int], normalise: Callable[[Tensor], Tensor]) -> Tensor:
        """The states of pictures, each computed alone or taken from memory."""
        found: dict[int, Tensor] = {}
        for number, key in enumerate(keys):
            if key in found:
                continue
            if key in self._kept:
                found[key] = sent(self._kept[key].read(), pixels.device)
                continue
            found[key] = self._tower(net, normalise(pixels[number : number + 1]))[0]
            size = found[key].nbytes
            if self._bytes + size <= self.room:
                self._kept[key] = Late(found[key])
                self._bytes += size
        return torch.stack([found[key] for key in keys])

    def positions(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The positions `(3, B, N)` of tokens in time, height and width; 0 at padding before the text.

        A text counts on in all three. A picture stands at one time, and the text behind it goes on after its side.
        """
        assert self.grid is not None
        inside = (ids == self.token) & mask
        text = (mask & ~inside).long()
        words = text.cumsum(-1) - text
        seen = inside.long().cumsum(-1) - inside.long()
        start = words + seen.div(self.count, rounding_mode="floor") * self.grid
        place = seen % self.count
        down, across = place.div(self.grid, rounding_mode="floor"), place % self.grid
        moved = torch.stack([torch.zeros_like(place), down, across]) * inside
        return (start + moved) * mask

    def __deepcopy__(self, memo: dict[int, Any]) -> PictureSide:
        """A picture side that has kept nothing yet: the copy may lie on another device."""
        new = object.__new__(PictureSide)
        new.__dict__.update(self.__dict__)
        new._kept, new._bytes, new._trained = {}, 0, None
        return new


@contextlib.contextmanager
def _of_examples(acting: Sequence[Slot], examples: Tensor) -> Iterator[None]:
    """Inside this context a choice of pets for each example is one for each picture: `examples (P,)` has its number."""
    before = [(slot, slot.active) for slot in acting]

    def of_pictures(one: str | Choice) -> str | Choice:
        if isinstance(one, str):
            return one
        rows = sent(examples, one.index.device)
        return replace(one, index=one.index[rows], weight=None if one.weight is None else one.weight[rows])

    try:
        for slot, active in before:
            if isinstance(active, tuple):
                slot.active = tuple(of_pictures(one) for one in active)
            elif active is not None:
                slot.active = of_pictures(active)
        yield
    finally:
        for slot, active in before:
            slot.active = active
