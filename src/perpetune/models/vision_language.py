"""A vision-language model: texts with pictures to texts. It is a causal language model, some of whose embeddings are
given."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from perpetune.data.names import several
from perpetune.data.pictured.view import PicturedView
from perpetune.data.sources import Kind
from perpetune.errors import UsageError
from perpetune.models.backbone import Backbone
from perpetune.models.causal_lm import CausalLM
from perpetune.models.picture_side import PictureSide
from perpetune.pets import parameters, sets, slots, using
from perpetune.tasks import Batch, Inputs, Task


class VisionLanguage(CausalLM):
    """The output layer of a vision-language model: answers about pictures are generated, or chosen among options.

    Pets act in the language part (`q`, `text.q`) or in the picture tower (`picture.q`). The tokens of a picture are
    computed once, if no pet acts in the tower.

    Args:
        backbone: a vision-language model.
        eval: `generate` writes the answer greedily; `options` scores the options of a question that has some.
        max_new_tokens: the most tokens of a generated answer.
        projector: whether the projector from pictures to the language part is trained, with `train.head_lr`. None
            trains it if its weights are random.
        keep: the most GiB of main memory for what a frozen tower has computed; 0 computes it anew each time.

    Raises:
        UsageError: an answer of `max_new_tokens` leaves no room for a question, or there is no projector to train.
    """

    reads: ClassVar[tuple[Kind, ...]] = ("pictured",)
    view: PicturedView

    def __init__(
        self,
        backbone: Backbone,
        *,
        eval: Literal["options", "generate"] = "options",  # noqa: A002  # what the key in a recipe is called
        max_new_tokens: Annotated[int, Field(ge=1)] = 64,
        projector: bool | None = None,
        keep: Annotated[float, Field(ge=0)] = 1.0,
    ):
        super().__init__(backbone, eval=eval, max_new_tokens=max_new_tokens)
        side = self._side
        if projector is False and side.drawn:
            raise UsageError(
                f"{backbone.spec}: its projector has random weights, so it would see nothing in pictures: leave "
                "head.projector out, or give a file of weights"
            )
        self.projector: nn.Module | None = None
        if side.drawn if projector is None else projector:
            if side.projector is None:
                raise UsageError(
                    f"{backbone.spec}: its projector is a part of its picture tower: leave head.projector out, and put "
                    "a pet at picture.proj or another role of the tower"
                )
            own = copy.deepcopy(backbone.net.get_submodule(side.projector)).requires_grad_(False)
            half = any(p.dtype in (torch.bfloat16, torch.float16) for p in own.parameters())
            self.projector = own.float() if half else own  # small steps vanish in 16 bits
            self.leaks = "the projector is trained (head.projector), so what the model sees in old pictures moves"
        side.room = int(keep * (1 << 30))
        self._warn_of_unread()

    @property
    def _side(self) -> PictureSide:
        side = self.backbone.pictures
        assert side is not None  # whatever takes `pictured` has one
        return side

    def trained(self) -> list[nn.Parameter]:
        return [] if self.projector is None else list(self.projector.parameters())

    def reset(self) -> None:
        if self.projector is not None:
            assert self._side.projector is not None
            self.projector.load_state_dict(self.backbone.net.get_submodule(self._side.projector).state_dict())

    def loss(self, task: Task, batch: Batch) -> Tensor:
        with self._projecting():
            return super().loss(task, batch)

    def features(self, inputs: Inputs) -> Tensor:
        with self._projecting():
            return super().features(inputs)

    @torch.no_grad()
    def predict(self, inputs: Inputs) -> Tensor:
        with self._projecting():
            return super().predict(inputs)

    def _warn_of_unread(self) -> None:
        """Say it if the picture tower has pets, and none of them acts on what is read of a picture."""
        side, net = self._side, self.backbone.net
        tower = net.get_submodule(side.path)
        names = tuple(sets(tower))
        own = [p for name in names for p in parameters(tower, name)]
        if not own:
            return
        taking = [p.requires_grad for p in own]
        size = self.view.picture.size
        empty = torch.zeros(1, 3, size, size, device=own[0].device)
        with using(tower, names), torch.enable_grad():
            for p in own:
                p.requires_grad_(True)
            states = side._tower(net, empty)
            read = states.requires_grad and any(
                g is not None for g in torch.autograd.grad(states.sum(), own, allow_unused=True)
            )
        for p, before in zip(own, taking, strict=True):
            p.requires_grad_(before)
        if not read:
            paths = [path for path, slot in slots(tower) if slot.pets]
            warnings.warn(
                f"{self.backbone.spec}: the pets in its picture tower ({several(paths, 3)}) change nothing, for the "
                "model reads the tower before them (LLaVA: vision_feature_layer): name earlier blocks in pet.blocks",
                stacklevel=2,
            )

    @contextlib.contextmanager
    def _projecting(self) -> Iterator[None]:
        with self._side.projecting(self.projector):
            yield

    def _generated(self, inputs: Inputs) -> Tensor:
        """Greedy answers: tokens `(B, M)`, padded after the end of each answer.

        transformers' `generate` has its own rules for embeddings, positions in three axes and masks in each family;
        here all come from `Backbone.asked`, as in training.
        """
        net: Any = self.backbone.net
        more = {"logits_to_keep": 1} if self._keeps else {}
        ids, mask = inputs.ids, inputs.mask
        ends = torch.tensor(sorted(self.view.ends), dtype=torch.int64, device=ids.device)
        done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        arguments, said = self.backbone.asked(inputs), []
        for _ in range(self.max_new_tokens):
            output = net(**arguments, **more, use_cache=True)
            token = output.logits[:, -1].argmax(-1).masked_fill(done, self.view.pad)
            said.append(token)
            done = done | torch.isin(token, ends)
            if bool(done.all()):
                break
            ids, mask = torch.cat([ids, token[:, None]], 1), torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            arguments = {"input_ids": token[:, None], "attention_mask": mask.long()}
            arguments[self._memory] = getattr(output, self._memory)
            if self.backbone.places:
                arguments["position_ids"] = self.backbone.positions(ids, mask)[..., -1:]
        return torch.stack(said, 1)
