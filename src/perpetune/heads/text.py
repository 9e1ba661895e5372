"""The head `text`: classes from their names, as the text tower of a dual encoder reads them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from perpetune.errors import UsageError
from perpetune.heads.base import Head, alone, grow_rows
from perpetune.heads.ncm import NCM
from perpetune.heads.ridge import Ridge
from perpetune.heads.templates import spoken, templates_of
from perpetune.named import Part
from perpetune.numerics.exact import exactly
from perpetune.numerics.fusion import Gate, class_texts, fused, gate_open
from perpetune.numerics.handover import sent
from perpetune.plain import names_in
from perpetune.tasks import Inputs

SHARP = 10.0  # fused scores lie near [0, 1]; times this their softmax tells people how sure the answer is
MOST_ASKED = 20_000  # names that are no candidates, whose texts are kept while the process lives


_Kept = tuple[Tensor, list[str], "tuple[Any, ...] | None", dict[str, Tensor]]
"""The texts that a head keeps: a table, the names of its rows, what pets did then, and the texts of other names."""


class Texts(Protocol):
    """What reads texts beside a backbone's pictures; `models.text_side.TextSide` is one."""

    @property
    def scale(self) -> Tensor: ...

    @property
    def bias(self) -> Tensor | None: ...

    @property
    def by_task(self) -> bool: ...

    def inputs(self, strings: Sequence[str], device: torch.device) -> Inputs: ...

    def encode(self, inputs: Inputs) -> Tensor: ...

    def of(self, strings: Sequence[str], batch: int = 64) -> Tensor: ...

    def state(self) -> tuple[Any, ...]: ...


class Expert(Part):
    """A head that learns the classes from statistics and may speak beside the names; further keys are its options."""

    of: ClassVar[str] = "heads"

    name: Literal["ridge", "ncm"]

    @property
    def options(self) -> dict[str, Any]:
        return {"scale": 1.0, **super().options}  # scores near 0 and 1, or cosines

    def make(self, dim: int) -> Head:
        """The head, for features of width `dim`."""
        made: Head = {"ridge": Ridge, "ncm": NCM}[self.name](dim, **self.options)
        return made


class Text(Head):
    """Compares pictures with the texts of the classes' names: zero-shot, Radford et al. 2021, arXiv:2103.00020.

    A class's text is the normalised mean of the normalised features of its templates. The score is `e^τ cos(f, t)`,
    with the factor of the pretrained model, plus its bias if it has one. The head answers with any class by its name,
    learned or not. Nothing has to be trained.

    With an `expert` the head also learns. The expert is a head from statistics on the same features. It speaks only
    where zero-shot finds a learned class likelier than every other candidate (the gate), as RAIL does, Xu et al. 2024,
    arXiv:2406.18868. Candidates are the learned classes, the `vocabulary`, and the names that are asked. So a picture
    of a class that was not learned is answered as before, if its name is a candidate. The expert also reads
    `backbone.taps`; zero-shot reads the net's own feature alone.

    With `zero_shot: bare` pets change what the expert reads, and zero-shot answers as the untouched model does. Then
    nothing of it can be lost. It costs a second pass at prediction.

    The texts of learned classes and of the vocabulary are computed once and stored. If pets change the text tower, they
    are computed again after each training. If each task has a context of its own, the texts of its classes are computed
    when the task was learned and stay as they are. Other names are read with the context in force.

    Args:
        templates: sentences with `{}` for the name, or the name of a packaged set (`photo`, `context`, `cifar`,
            `seven`). In training with pets in the text tower one of them is drawn for each class and step. `[context]`
            at the beginning of one stands for the vectors of the pet `context`.
        vocabulary: further names that may be the answer, as a list, or a file with one name on each line.
        expert: `ridge` or `ncm` with its options; none means zero-shot alone, and what pets learn.
        fusion: `β`, the share of the expert where it may speak.
        gate: `zero_shot`, or `none` to let the expert speak always.
        learn_scale: train `τ` too.
        zero_shot: the net that zero-shot reads: the `tuned` one, or the `bare` one without pets.

    Raises:
        UsageError: the backbone has no text tower, or options do not fit.
    """

    any_class: ClassVar[bool] = True
    reads: ClassVar[bool] = True
    kept: Tensor

    def __init__(
        self,
        dim: int,
        *,
        templates: str | list[str] = "photo",
        vocabulary: str | list[str] | None = None,
        expert: Expert | None = None,
        fusion: Annotated[float, Field(ge=0, le=1)] = 0.8,
        gate: Gate = "zero_shot",
        learn_scale: bool = False,
        zero_shot: Literal["tuned", "bare"] = "tuned",
    ):
        super().__init__(dim)
        self.templates, self.fusion, self.gate = templates_of(templates), fusion, gate
        self.vocabulary = names_in(vocabulary or (), "head: text: the vocabulary")
        self.expert = None if expert is None else Expert.model_validate(expert).make(dim)
        self.statistics = self.expert is not None  # type: ignore[misc]
        self.carry = self.expert is not None and self.expert.carry
        self.bare = zero_shot == "bare"
        if self.bare and self.expert is None:
            raise UsageError(
                "head: text: with zero_shot: bare the names answer as if nothing had been learned, so something else "
                "has to: add an expert"
            )
        self.width = dim
        """The width of what the expert reads: `dim`, and further columns of taps."""
        self.shift = nn.Parameter(torch.zeros(()), requires_grad=False) if learn_scale else None
        """How far `τ` has moved from the pretrained one."""
        self.side: Texts | None = None
        self.names: list[str] = []
        """The names whose texts are kept, in the order of the rows of `kept`."""
        self.register_buffer("kept", torch.zeros(0, dim))
        self.settled: nn.Parameter | None = None
        """The texts of the classes, in their order, if each task has a context of its own; zero before a task ends."""
        self._open: set[str] = set()  # classes of the task that is learned now
        self._state: tuple[Any, ...] | None = None
        self._asked: dict[str, Tensor] = {}
        """Texts of other names that were asked; they are not stored."""
        self._others: dict[tuple[str, ...], _Kept] = {}
        """The texts in other templates that were asked for."""

    @classmethod
    def of(cls, backbone: Any, **options: Any) -> Text:
        if getattr(backbone, "texts", None) is None:
            raise UsageError(
                f"head: text needs a backbone that reads pictures and texts, such as CLIP, and {backbone.spec} has no "
                "text tower: use another head, such as ridge"
            )
        head = cls(backbone.own, **options)
        head.side = backbone.texts
        if backbone.taps is not None:
            if head.expert is None:
                raise UsageError(
                    "head: text: names are compared with the net's own feature, and an expert reads backbone.taps: add "
                    "an expert, or leave backbone.taps out"
                )
            head.width = backbone.dim
            head.expert.widen(backbone.dim)
        if backbone.texts.by_task:
            head.settled = nn.Parameter(torch.zeros(0, backbone.own), requires_grad=False)
        return head

    # -- texts ----------------------------------------------------------------------------------------

    @property
    def candidates(self) -> list[str]:
        """The learned classes, then the rest of the vocabulary."""
        return list(dict.fromkeys((*self.classes, *self.vocabulary)))

    @contextlib.contextmanager
    def reading(self, templates: str | Sequence[str]) -> Iterator[None]:
        """Inside this context names are read in these templates. The texts in the head's own are kept for later, and
        those of tasks with a context of their own stay."""
        other, own = templates_of(templates), (self.templates, self._texts())
        if other == self.templates:
            yield
            return
        try:
            self.templates = other
            self.kept, self.names, self._state, self._asked = self._others.get(other) or (self.kept[:0], [], None, {})
            yield
        finally:
            self._others[other] = self._texts()
            self.templates, (self.kept, self.names, self._state, self._asked) = own

    def _texts(self) -> _Kept:
        """The texts that are kept in the present templates."""
        return self.kept, self.names, self._state, self._asked

    def texts(self, names: Sequence[str]) -> Tensor:
        """Texts `(n, D)` of length 1 of names. Those of candidates are kept. In training, gradients flow to pets in the
        text tower."""
        if self.settled is None:
            return self._read(names)
        rows = {name: row for row, name in enumerate(self.classes) if name not in self._open}
        others = [name for name in dict.fromkeys(names) if name not in rows]
        table = torch.cat([self.settled, self._read(others).to(self.settled)]) if others else self.settled
        rows |= {name: len(self.settled) + number for number, name in enumerate(others)}
        return table[sent([rows[name] for name in names], table.device, torch.int64)]

    def _read(self, names: Sequence[str]) -> Tensor:
        """As `texts`, by the text tower as it is now."""
        assert self.side is not None
        state = self.side.state()
        if state and self.training and torch.is_grad_enabled():
            return self._drawn(names)
        if state != self._state:
            if self._state is not None or state:  # what was loaded belongs to the tower as it was stored
                self.kept, self.names = self.kept[:0], []
            self._state, self._asked = state, {}
        known = set(self.names)
        wanted = self.candidates if self.settled is None else self.vocabulary
        if missing := [name for name in wanted if name not in known]:
            self.kept = torch.cat([self.kept, self._made(missing).to(self.kept)])
            self.names += missing
        rows = {name: number for number, name in enumerate(self.names)}
        others = [name for name in dict.fromkeys(names) if name not in rows]
        table = torch.cat([self.kept, self._of_asked(others)]) if others else self.kept
        rows |= {name: len(self.names) + number for number, name in enumerate(others)}
        return table[sent([rows[name] for name in names], table.device, torch.int64)]

    def _of_asked(self, names: Sequence[str]) -> Tensor:
        """Texts `(n, D)` of names that are no candidates, each read once."""
        if new := [name for name in names if name not in self._asked]:
            if len(self._asked) + len(new) > MOST_ASKED:
                self._asked = {name: self._asked[name] for name in names if name in self._asked}
            self._asked |= dict(zip(new, self._made(new).to(self.kept), strict=True))
        return torch.stack([self._asked[name] for name in names])

    @torch.no_grad()
    def _made(self, names: Sequence[str]) -> Tensor:
        """Texts `(n, D)` of names, from all templates."""
        assert self.side is not None
        features = self.side.of(self.sentences(names)).float()
        return class_texts(features.unflatten(0, (len(names), len(self.templates)))) if names else features

    def sentences(self, classes: Sequence[str]) -> list[str]:
        return [template.format(spoken(name)) for name in classes for template in self.templates]

    def _drawn(self, names: Sequence[str]) -> Tensor:
        """Texts of names with gradients, each from a template drawn for this step."""
        assert self.side is not None
        picks = torch.randint(len(self.templates), (len(names),)).tolist()
        sentences = [self.templates[pick].format(spoken(name)) for name, pick in zip(names, picks, strict=True)]
        return F.normalize(self.side.encode(self.side.inputs(sentences, self.kept.device)).float(), dim=-1)

    # -- scores ---------------------------------------------------------------------------------------

    def forward(self, features: Tensor) -> Tensor:
        return self.among(features, self.classes)

    def among(self, features: Tensor, classes: Sequence[str]) -> Tensor:
        """Scores `(B, len(classes))` of classes, learned or not.

        Without an expert they are logits. With one they are the fused scores over all candidates, of which those of
        `classes` are given; their softmax is what people see.
        """
        if self.expert is None or not self.classes or not self.fusion:
            return self._logits(features, classes)
        names, learned = self._all(classes)
        with exactly(features.device):
            shares = self._logits(features, names).softmax(-1)
            scores = fused(shares, self._expert(features), learned, self.fusion, self.gate)
        rows = {name: number for number, name in enumerate(names)}
        return SHARP * scores[:, sent([rows[name] for name in classes], scores.device, torch.int64)]

    def gates(self, features: Tensor, classes: Sequence[str]) -> Mapping[str, Tensor]:
        if self.expert is None or not self.classes or not self.fusion:
            return {}
        names, learned = self._all(classes)
        shares = self._logits(features, names).softmax(-1)
        return {"the expert speaks": gate_open(shares, learned, self.gate)}

    def _all(self, asked: Sequence[str]) -> tuple[list[str], Tensor]:
        """All candidates, those that are asked among them, and the columns of the learned ones."""
        names = list(dict.fromkeys((*self.candidates, *asked)))
        return names, torch.arange(len(self.classes), device=self.kept.device)

    def _logits(self, features: Tensor, names: Sequence[str]) -> Tensor:
        assert self.side is not None
        with exactly(features.device):
            own = F.normalize(features[:, : self.dim].float(), dim=-1)
            logits = self._scale() * own @ self.texts(names).T.to(features.device)
        return logits if self.side.bias is None else logits + self.side.bias.to(logits)

    def _scale(self) -> Tensor:
        """`e^τ`, at most 100 if it is trained, as in CLIP's own training."""
        assert self.side is not None
        scale = self.side.scale.to(self.kept)
        return scale if self.shift is None else (scale.log() + self.shift).clamp(max=math.log(100.0)).exp()

    def _expert(self, features: Tensor) -> Tensor:
        assert self.expert is not None
        scores: Tensor = self.expert(self._of_expert(features))
        return scores.masked_fill(scores.isneginf(), 0.0)

    def _of_expert(self, features: Tensor) -> Tensor:
        """The columns `(B, width)` that the expert reads; the net's own feature among them has length 1."""
        tuned = features[:, features.shape[1] - self.width :].float()
        own = F.normalize(tuned[:, : self.dim], dim=-1)
        return own if self.width == self.dim else torch.cat([own, tuned[:, self.dim :]], dim=-1)

    def logits(self, features: Tensor) -> Tensor:
        return self._logits(features, self.classes)

    def logits_of(self, features: Tensor, rows: Tensor) -> Tensor:
        return self._logits(features, [self.classes[row] for row in rows.tolist()])

    # -- growing, training, statistics ----------------------------------------------------------------

    def trained(self) -> list[nn.Parameter]:
        return [] if self.shift is None else [self.shift]

    def grow(self, classes: Sequence[str], generator: torch.Generator) -> None:
        heard: dict[str, str] = {}
        for name in (*self.classes, *classes):
            other = heard.setdefault(spoken(name), name)
            if other != name and name not in self.classes:
                warnings.warn(
                    f"head: text: classes {other!r} and {name!r} have the same text {spoken(name)!r}, so names cannot "
                    "tell them apart",
                    stacklevel=2,
                )
        super().grow(classes, generator)
        self._open = set(classes)
        if self.expert is not None:
            self.expert.grow(classes, generator)

    def resize(self, rows: int, generator: torch.Generator) -> None:
        """The expert grows with the head. Else nothing has a row for each class, but for texts that stay."""
        if self.settled is not None:
            new = grow_rows(self.settled, rows, generator, 0.0)
            self.settled = nn.Parameter(new, requires_grad=False)

    def per_class(self) -> list[nn.Parameter]:
        return [] if self.settled is None else [self.settled]

    @torch.no_grad()
    def finish(self, classes: Sequence[str]) -> None:
        if self.settled is not None:
            self.settled[self.rows(classes, self.settled.device)] = self._made(classes).to(self.settled)
        self._open = set()

    def reset(self) -> None:
        super().reset()
        self._open = set()
        if self.expert is not None:
            self.expert.reset()

    def widen(self, dim: int) -> None:
        raise UsageError(
            "head: text compares the net's own feature with texts, so no other feature can stand beside it"
        )

    def expect(self, counts: Tensor) -> None:
        self._known().expect(counts)

    def observe(self, features: Tensor, rows: Tensor) -> None:
        self._known().observe(self._of_expert(features), rows)

    def follow(self, before: Tensor, after: Tensor, targets: Tensor) -> None:
        self._known().follow(self._of_expert(before), self._of_expert(after), targets)

    def ready(self) -> None:
        if self.expert is not None:
            self.expert.ready()

    def flush(self) -> None:
        self._known().flush()

    def additive(self) -> list[Tensor]:
        return [] if self.expert is None else self.expert.additive()

    def settle(self, total: Callable[[Tensor], Tensor] = alone) -> None:
        self._known().settle(total)

    @torch.no_grad()
    def take_out(self, part: Callable[[], tuple[Head | None, Head]], gone: Sequence[str], whole: bool) -> None:
        if self.expert is None:
            super().take_out(part, gone, whole)

        def of_expert() -> tuple[Head | None, Head]:
            before, after = part()
            assert isinstance(after, Text)
            assert after.expert is not None
            return (before.expert if isinstance(before, Text) else None), after.expert

        self._known().take_out(of_expert, gone, whole)
        stay = self.leave_out(gone)
        if self.settled is not None:
            self.settled = nn.Parameter(self.settled.detach()[stay], requires_grad=False)
        names = [row for row, name in enumerate(self.names) if name not in gone or name in self.vocabulary]
        self.kept, self.names = self.kept[names], [self.names[row] for row in names]

    def _known(self) -> Head:
        assert self.expert is not None
        return self.expert

    # -- reporting and storing ------------------------------------------------------------------------

    def get_extra_state(self) -> dict[str, Any]:
        return {**super().get_extra_state(), "names": self.names, "templates": self._digest()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        names = state["names"]
        if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise ValueError("names is no list of names")
        if state["templates"] != self._digest():
            raise ValueError("its texts were made with other templates")
        super().set_extra_state({"classes": state["classes"]})
        self.names = list(names)
        self.kept = self.kept.new_zeros(len(names), self.dim)
        self._state, self._asked, self._others = None, {}, {}

    def _digest(self) -> str:
        return hashlib.sha256(json.dumps(self.templates).encode()).hexdigest()[:16]
