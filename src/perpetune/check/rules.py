"""The rules of `perpetune check PKG.MOD:CLASS`.

For each rule the method learns a stream of tiny made-up pictures, and if it can train a language model also of tiny
texts, on the CPU.
"""

from __future__ import annotations

import dataclasses
import inspect
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from perpetune import registry
from perpetune.build import build_method
from perpetune.check.kind import CLASSES, TinyKind
from perpetune.check.pictures import TinyPictures
from perpetune.errors import Interrupted, PerpetuneError, UsageError
from perpetune.heads.base import Head
from perpetune.learning import learn_protected
from perpetune.methods.base import Method
from perpetune.models.backbone import Backbone
from perpetune.models.causal_lm import CausalLM
from perpetune.pets import PET, frozen
from perpetune.protection.config import ProtectConfig
from perpetune.recipe import Recipe, apply_change, make_recipe
from perpetune.runtime import Runtime
from perpetune.seeding import generator
from perpetune.snapshot import restore, snapshot, tensors
from perpetune.state import MidTask
from perpetune.tasks import Task

HELD = 0.1  # with protection old outputs may move by at most this share of their movement without it
ENERGY = 0.9999  # the least share of the features' energy that is protected in this test
KEYS = ("average", "head", "pet", "pets", "protect")  # sections of a recipe that `perpetune check --set` can change


@dataclass(frozen=True)
class Outcome:
    """The outcome of one rule.

    Attributes:
        rule: the rule as a sentence.
        fault: why the method breaks the rule; None if it keeps it.
        on: the kind of example on which the rule was tested.
        left_out: the reason why it was not tested; empty if it was.
    """

    rule: str
    fault: str | None
    on: str = "pictures"
    left_out: str = ""


class NotApplicable(Exception):
    """A rule says nothing about a method with these options; the text is the reason."""


@dataclass(frozen=True)
class Learned:
    """A method that has learned the whole stream without a stop, and records of the learning.

    Attributes:
        method: the method; the rules only read it.
        before: the backbone's tensors before the first task.
        snapshots: the method as files after each task.
        classes: its classes after each task.
        shapes: the shapes of its scores for new examples of all classes, after each task.
        global_states: the states of the global generators of torch, numpy and random, before and after.
    """

    method: Method
    before: Mapping[str, Tensor]
    snapshots: Sequence[Mapping[str, bytes]]
    classes: Sequence[Sequence[str]]
    shapes: Sequence[tuple[int, ...]]
    global_states: tuple[tuple[Tensor, str, object], tuple[Tensor, str, object]]


class Checker:
    """Makes and teaches fresh copies of one method.

    Args:
        recipe: names the method, pet, head, protection and training; its backbone and data are not used.
        kind: the examples and the backbone that reads them; None is pictures.
    """

    def __init__(self, recipe: Recipe, kind: TinyKind | None = None):
        self.recipe, self.kind = recipe, kind or TinyPictures()
        self.backbone: Backbone

    def make(self, recipe: Recipe | None = None) -> Method:
        self.backbone = self.kind.backbone()
        return build_method(recipe or self.recipe, self.backbone)

    def stream(self, classes: Sequence[Sequence[str]] = CLASSES) -> list[Task]:
        return self.kind.stream(Runtime(seed=self.recipe.seed), classes)

    def learn(self, method: Method, tasks: Sequence[Task], first: int = 0) -> Method:
        """Let the method learn the tasks, from number `first` on."""
        for task in with_earlier(method, tasks)[first:]:
            learn_protected(method, task)
        return method

    def learned(self, tasks: Sequence[Task] | None = None) -> Method:
        return self.learn(self.make(), tasks or self.stream())

    def stored(self, task: int) -> Method:
        """A new method with the stored state after a task of the whole stream."""
        method = self.make()
        restore(method, self.whole.snapshots[task], "memory")
        return method

    def scores(self, method: Method, classes: Sequence[str] = "abcdef") -> Tensor:
        """The method's scores for a few new examples of each class."""
        with torch.no_grad():
            return method.predict(self.kind.asked(classes))

    @cached_property
    def whole(self) -> Learned:
        """The whole stream, learned once for all rules that only read the result."""
        generators = global_states()
        method = self.make()
        before = {name: t.clone() for name, t in frozen(self.backbone.net).items()}
        snapshots, classes, shapes = [], [], []
        for task in with_earlier(method, self.stream()):
            learn_protected(method, task)
            snapshots.append(snapshot(method))
            classes.append(list(method.classes))
            shapes.append(tuple(self.scores(method).shape))
        return Learned(method, before, snapshots, classes, shapes, (generators, global_states()))


def with_earlier(method: Method, tasks: Sequence[Task]) -> list[Task]:
    """The tasks. If the method needs earlier data, each task also carries the tasks before it."""
    if not method.needs_earlier_data:
        return list(tasks)
    return [dataclasses.replace(task, earlier=tuple(tasks[:i])) for i, task in enumerate(tasks)]


def global_states() -> tuple[Tensor, str, object]:
    """The states of the global generators of torch, numpy and random."""
    # Only this legacy call gives numpy's global state.
    return torch.get_rng_state(), repr(np.random.get_state()), random.getstate()  # noqa: NPY002


def probe(method: Method, classes: Sequence[str] = "abcdef") -> Tensor:
    """Scores for a few new pictures of each class."""
    with torch.no_grad():
        return method.predict(TinyPictures().asked(classes))


def backbone_untouched(c: Checker) -> None:
    """the backbone is bit-identical after learning"""
    now = frozen(c.whole.method.model.backbone.net)
    for name, tensor in c.whole.before.items():
        assert torch.equal(now[name], tensor), f"{name} changed"


def only_own_parameters_trained(c: Checker) -> None:
    """only pets, the head and the method's own tensors change, and no gradient is left on"""
    method = c.whole.method
    stored = {id(t) for group in tensors(method).values() for t in group.values()}
    left = [n for n, p in method.named_parameters() if p.requires_grad or p.grad is not None]
    assert not left, f"requires_grad or a gradient is left on {left[0]}"
    held = {id(t) for m in method.modules() if isinstance(m, (PET, Head)) for t in m.parameters()}
    assert held <= stored, "a pet or head is not part of what is stored"


def same_seed_same_result(c: Checker) -> None:
    """the same seed gives the same result"""
    assert torch.equal(c.scores(c.whole.method), c.scores(c.learned())), "two runs with one seed differ"


def checkpoint_round_trip(c: Checker) -> None:
    """the stored state restores the whole method"""
    method, other = c.whole.method, c.stored(-1)
    assert other.classes == method.classes, f"classes {other.classes} came back, not {method.classes}"
    assert torch.equal(c.scores(method), c.scores(other)), "the restored method predicts differently"


def stopping_between_tasks_changes_nothing(c: Checker) -> None:
    """stopping after a task, storing, loading and continuing gives the same result as not stopping"""
    tasks = c.stream()
    for stop in range(1, len(tasks)):
        second = c.learn(c.stored(stop - 1), tasks, stop)
        assert torch.equal(c.scores(second), c.scores(c.whole.method)), f"stopping after task {stop} changed the result"


def stopping_inside_a_task_changes_nothing(c: Checker) -> None:
    """stopping at a step inside a task and starting again gives the same result as not stopping"""
    whole = c.scores(c.whole.method)
    with tempfile.TemporaryDirectory() as folder:
        for stop in (1, 3):
            method = c.stored(-2)
            last = with_earlier(method, c.stream())[-1]
            runtime, path = last.runtime, Path(folder) / str(stop)
            about = (last.index, last.name, "")
            runtime.checkpoints = MidTask(path, method, about, 1)
            runtime.stopping = _after(stop)
            try:
                learn_protected(method, last)
            except Interrupted:
                method = c.stored(-2)
                runtime.checkpoints = MidTask(path, method, about, 1)
                runtime.stopping = lambda: None
                learn_protected(method, last)
            assert torch.equal(c.scores(method), whole), f"stopping after step {stop} changed the result"


def _after(steps: int) -> Callable[[], int | None]:
    calls = iter(range(1, 1_000_000))
    return lambda: 15 if next(calls) >= steps else None


def batch_companions_do_not_matter(c: Checker) -> None:
    """the score of an input does not depend on the other inputs of its batch"""
    method, inputs = c.whole.method, c.kind.asked("abcdef")
    order = torch.randperm(len(inputs), generator=generator("order"))
    with torch.no_grad():
        whole = method.predict(inputs)
        shuffled = torch.cat([method.predict(inputs.rows(part.tolist())) for part in order.split(5)])
    torch.testing.assert_close(shuffled, whole[order], rtol=1e-4, atol=1e-4)


def scores_only_for_classes_seen(c: Checker) -> None:
    """there is one score for each class seen, and no other"""
    if not c.whole.method.model.chooses:
        raise NotApplicable("answers are texts")
    seen: list[str] = []
    for task, classes, shape in zip(c.stream(), c.whole.classes, c.whole.shapes, strict=True):
        seen += [name for name in task.classes if name not in seen]
        assert sorted(classes) == sorted(seen), f"after {task.name} it knows {classes}, not {seen}"
        assert shape == (18, len(seen)), f"scores are {shape} for {len(seen)} classes"


def nothing_but_inputs_reaches_predict(c: Checker) -> None:
    """`predict` takes only inputs, and learning never reads test data"""
    method = c.whole.method  # its tasks had test data that raise an error if they are read
    parameters = list(inspect.signature(method.predict).parameters)
    assert len(parameters) == 1, f"predict takes {parameters}"


def small_tasks(c: Checker) -> None:
    """a task of one class, and one with fewer examples than a batch, can be learned"""
    tasks = c.stream((("a", "b"), ("c",), ("d", "e")))
    tasks[2] = dataclasses.replace(tasks[2], train=c.kind.examples("de", 1, 5))
    _finite(c, c.learned(tasks))


def known_classes_come_back(c: Checker) -> None:
    """a class that comes again, alone or with new ones, keeps its name and place"""
    method = c.learned(c.stream((("a", "b"), ("b", "c"), ("a", "b"))))
    if method.model.chooses:
        assert sorted(method.classes) == ["a", "b", "c"], f"it knows {method.classes}"
    _finite(c, method)


def _finite(c: Checker, method: Method) -> None:
    assert torch.isfinite(c.scores(method)).all(), "scores are not finite"


def global_generators_untouched(c: Checker) -> None:
    """nothing is drawn from the global generators of torch, numpy or random"""
    before, after = c.whole.global_states
    assert torch.equal(before[0], after[0]), "torch's global generator was used"
    assert before[1:] == after[1:], "the global generator of numpy or random was used"


def protection_protects(c: Checker) -> None:
    """under `protect:` old outputs move less than a tenth of what they move without it"""
    given = (c.recipe.protect or ProtectConfig()).model_dump()
    given["energy"] = max(ENERGY, given["energy"])  # a low energy in the recipe is no fault of the method
    moved: list[float | None] = []
    for directions in ("features", "none"):
        config = ProtectConfig.model_validate({**given, "directions": directions})
        try:
            method = c.make(c.recipe.model_copy(update={"protect": config}))
        except UsageError as error:
            raise NotApplicable(str(error)) from None
        if method.leaks:
            raise NotApplicable(method.leaks)
        certificates: list[dict[str, Any]] = []
        for task in with_earlier(method, c.stream()):
            certificates = learn_protected(method, task)
        moved.append(certificates[-1]["worst"])
    held, free = moved
    if held is None or free is None:
        raise NotApplicable("the outputs of all sites are zero")
    assert held <= HELD * free, (
        f"the worst site's outputs move by {held:.2g} with protection, and by {free:.2g} without it"
    )


Rule = Callable[[Checker], None]
RULES: tuple[Rule, ...] = (
    backbone_untouched,
    only_own_parameters_trained,
    same_seed_same_result,
    checkpoint_round_trip,
    stopping_between_tasks_changes_nothing,
    stopping_inside_a_task_changes_nothing,
    batch_companions_do_not_matter,
    scores_only_for_classes_seen,
    nothing_but_inputs_reaches_predict,
    small_tasks,
    known_classes_come_back,
    global_generators_untouched,
    protection_protects,
)


def check_method(
    method: str,
    changes: Sequence[str] = (),
    on: str | None = None,
    told: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Test every rule on a method: with pictures, and if it can train a language model also with texts.

    Args:
        method: the name of a built-in method, or PACKAGE.MODULE:CLASS.
        changes: `key=value`: `head=NAME`, `pet=NAME` or `pet=none`, `protect=true`, a key of `protect` or of
            `average`, else an option of the method. With a head that chooses among classes only pictures are used, with
            `head=lm` only texts.
        on: `pictures` or `texts`, to use only this kind.
        told: is called with each outcome as soon as it is known.

    Raises:
        UsageError: there is no such method, it cannot be built with these options, or nothing is left to check.
    """
    content: dict[str, Any] = {
        "method": {"name": method},
        "pet": "lora",
        "train": {"epochs": 2, "batch_size": 8, "lr": 0.01},
    }
    for change in changes:
        top = change.partition("=")[0].partition(".")[0]
        apply_change(content if top in KEYS else content["method"], change)
    kind = registry.find("methods", method)
    head = content.get("head")
    named = head.get("name") if isinstance(head, dict) else head
    checkers = []
    if on != "texts" and named != "lm":
        checkers.append(Checker(make_recipe(content)))
    if on != "pictures" and named in (None, "lm") and issubclass(CausalLM, kind.fits):
        from perpetune.check.texts import TinyTexts

        checkers.append(Checker(make_recipe({"head": "lm", **content}), TinyTexts()))
    if on is not None and not checkers:
        raise UsageError(f"method {method} with these options is not for {on}")
    outcomes: list[Outcome] = []

    def tell(outcome: Outcome) -> None:
        outcomes.append(outcome)
        told(outcome)

    for number, checker in enumerate(checkers):
        try:
            checker.make()
        except UsageError as error:
            if number == 0 or not changes:
                raise
            tell(Outcome("all rules", None, checker.kind.name, str(error)))
            continue
        for rule in RULES:
            tell(_outcome(rule, checker))
    return outcomes


def _outcome(rule: Rule, checker: Checker) -> Outcome:
    fault, reason = None, ""
    try:
        rule(checker)
    except NotApplicable as error:
        reason = str(error)
    except PerpetuneError as error:
        fault = str(error)
    except AssertionError as error:
        fault = " ".join(str(error).split()) or "the method breaks the rule"
    except Exception as error:  # noqa: BLE001  a foreign method may fail in any way, and the other rules are still tested
        fault = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return Outcome((rule.__doc__ or rule.__name__).strip(), fault, checker.kind.name, reason)
