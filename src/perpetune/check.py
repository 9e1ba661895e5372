"""The contract every method keeps, as checks that run on anybody's: `perpetune check PKG.MOD:CLASS`.

Each rule learns a stream of tiny synthetic pictures with a tiny transformer on the CPU, in about a second.
"""

from __future__ import annotations

import dataclasses
import inspect
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from perpetune import registry
from perpetune.build import build_method
from perpetune.data.pictures.view import PictureView
from perpetune.errors import Interrupted, PerpetuneError
from perpetune.heads.base import Head
from perpetune.methods.base import Method
from perpetune.models.backbone import Backbone
from perpetune.pets import PET, frozen
from perpetune.recipe import Recipe, apply_change, make_recipe
from perpetune.run import learn_protected
from perpetune.runtime import Runtime
from perpetune.seeding import generator, own_global_state
from perpetune.snapshot import restore, snapshot, tensors
from perpetune.state import MidTask
from perpetune.tasks import Examples, Inputs, Task

SIZE = 16  # side of the pictures, in pixels


@dataclass(frozen=True)
class Outcome:
    """How one rule went; `fault` is None when it holds."""

    rule: str
    fault: str | None


class Pictures(Examples):
    """Noisy pictures whose class is a fixed pattern."""

    def __init__(self, classes: Sequence[str], each: int, seed: int):
        patterns = [torch.randint(0, 256, (3, SIZE, SIZE), generator=generator("pattern", c)) for c in classes]
        self.targets = [y for y in range(len(classes)) for _ in range(each)]
        noise = torch.randint(-40, 41, (len(self.targets), 3, SIZE, SIZE), generator=generator("noise", seed))
        pairs = zip(self.targets, noise, strict=True)
        self.pixels = [(patterns[y] + n).clamp(0, 255).to(torch.uint8) for y, n in pairs]

    def __len__(self) -> int:
        return len(self.targets)

    def load(self, index: int, seed: int | None) -> Tensor:
        pixels: Tensor = self.pixels[index]
        return pixels if seed is None or seed % 2 else pixels.flip(2)


class Untouchable(Examples):
    """Test data that a method must not look at."""

    def __getattribute__(self, name: str) -> Any:
        if name == "__class__":  # what `isinstance` asks for
            return Untouchable
        raise AssertionError(f"the method looked at the test data ({name})")

    def __len__(self) -> int:
        raise AssertionError("the method looked at the test data")

    def load(self, index: int, seed: int | None) -> Any:
        raise AssertionError("the method looked at the test data")


def tiny_backbone() -> Backbone:
    """A transformer of two blocks and width 32, its weights random but always the same."""
    from transformers import ViTConfig, ViTModel

    from perpetune.models.loaders.vit import class_token

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=SIZE, patch_size=4
    )
    with own_global_state("tiny backbone"):
        net = ViTModel(config, add_pooling_layer=False)
    return Backbone(net, spec="tiny", dim=32, preprocess=PictureView(SIZE), forward=class_token)


def tiny_stream(
    runtime: Runtime, classes: Sequence[Sequence[str]] = (("a", "b"), ("c", "d"), ("e", "f"))
) -> list[Task]:
    """Tasks of twelve pictures a class."""
    tasks = []
    for i, names in enumerate(classes):
        train = Pictures(names, 12, seed=i)
        tasks.append(Task(i, f"task-{i + 1}", tuple(names), train, test=Untouchable(), runtime=runtime))
    return tasks


class Checker:
    """Makes and teaches fresh copies of one method.

    Args:
        recipe: names the method, pet, head, protection and training; its backbone and data are not used.
    """

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.backbone: Backbone
        self._whole: Method | None = None

    def make(self) -> Method:
        self.backbone = tiny_backbone()
        return build_method(self.recipe, self.backbone)

    def learn(self, method: Method, tasks: Sequence[Task]) -> Method:
        for i, task in enumerate(tasks):
            earlier = tuple(tasks[:i]) if method.needs_earlier_data else None
            learn_protected(method, dataclasses.replace(task, earlier=earlier))
        return method

    def learned(self, tasks: Sequence[Task] | None = None) -> Method:
        return self.learn(self.make(), tasks or tiny_stream(Runtime(seed=self.recipe.seed)))

    def whole(self) -> Method:
        """One that has learned the stream without a stop, made once for all rules: to be looked at alone."""
        if self._whole is None:
            self._whole = self.learned()
        return self._whole


def probe(method: Method, classes: Sequence[str] = "abcdef") -> Tensor:
    """Scores for a few new pictures of each class."""
    pixels = torch.stack(Pictures(classes, 3, seed=99).pixels)
    with torch.no_grad():
        return method.predict(Inputs(pixels=pixels))


def backbone_untouched(c: Checker) -> None:
    """the backbone is bit-identical after learning"""
    method = c.make()
    before = {name: t.clone() for name, t in frozen(c.backbone.net).items()}
    c.learn(method, tiny_stream(Runtime()))
    for name, tensor in frozen(c.backbone.net).items():
        assert torch.equal(before[name], tensor), f"{name} changed"


def only_own_parameters_trained(c: Checker) -> None:
    """only pets, the head and the method's own tensors change, and no gradient is left on"""
    method = c.whole()
    own = {id(t) for group in tensors(method).values() for t in group.values()}
    left = [n for n, p in method.named_parameters() if p.requires_grad or p.grad is not None]
    assert not left, f"requires_grad or a gradient is left on {left[0]}"
    held = {id(t) for m in method.modules() if isinstance(m, (PET, Head)) for t in m.parameters()}
    assert held <= own, "a pet or head is not part of what is stored"


def same_seed_same_result(c: Checker) -> None:
    """the same seed gives the same result"""
    assert torch.equal(probe(c.whole()), probe(c.learned())), "two runs with one seed differ"


def checkpoint_round_trip(c: Checker) -> None:
    """what is stored brings everything back"""
    method = c.whole()
    other = c.make()
    restore(other, snapshot(method), "memory")
    assert other.classes == method.classes, f"classes {other.classes} came back, not {method.classes}"
    assert torch.equal(probe(method), probe(other)), "the restored method predicts differently"


def stopping_between_tasks_changes_nothing(c: Checker) -> None:
    """stopped after a task, stored, loaded and continued = never stopped"""
    tasks = tiny_stream(Runtime(seed=c.recipe.seed))
    for stop in (1, 2):
        first = c.learn(c.make(), tasks[:stop])
        second = c.make()
        restore(second, snapshot(first), "memory")
        for i in range(stop, len(tasks)):
            earlier = tuple(tasks[:i]) if second.needs_earlier_data else None
            learn_protected(second, dataclasses.replace(tasks[i], earlier=earlier))
        assert torch.equal(probe(second), probe(c.whole())), f"stopping after task {stop} changed the result"


def stopping_inside_a_task_changes_nothing(c: Checker) -> None:
    """stopped at any step of a task and entered again = never stopped"""
    whole = probe(c.whole())
    with tempfile.TemporaryDirectory() as folder:
        for stop in (1, 3):
            runtime = Runtime(seed=c.recipe.seed)
            tasks = tiny_stream(runtime)
            method = c.learn(c.make(), tasks[:2])
            base = snapshot(method)
            last = dataclasses.replace(tasks[2], earlier=tuple(tasks[:2]) if method.needs_earlier_data else None)
            path = Path(folder) / str(stop)
            runtime.checkpoints = MidTask(path, method, (2, last.name, ""), 1)
            runtime.stopping = _after(stop)
            try:
                learn_protected(method, last)
            except Interrupted:
                method = c.make()
                restore(method, base, "memory")
                runtime.checkpoints = MidTask(path, method, (2, last.name, ""), 1)
                runtime.stopping = lambda: None
                learn_protected(method, last)
            assert torch.equal(probe(method), whole), f"stopping after step {stop} changed the result"


def _after(steps: int) -> Callable[[], int | None]:
    asked = iter(range(1, 1_000_000))
    return lambda: 15 if next(asked) >= steps else None


def batch_companions_do_not_matter(c: Checker) -> None:
    """the score of one input is independent of its batch companions"""
    method = c.whole()
    inputs = Inputs(pixels=torch.stack(Pictures("abcdef", 3, seed=99).pixels))
    order = torch.randperm(len(inputs), generator=generator("order"))
    with torch.no_grad():
        whole = method.predict(inputs)
        shuffled = torch.cat([method.predict(inputs.rows(part.tolist())) for part in order.split(5)])
    torch.testing.assert_close(shuffled, whole[order], rtol=1e-4, atol=1e-4)


def scores_only_for_classes_seen(c: Checker) -> None:
    """there is one score for each class seen, and no other"""
    method, seen = c.make(), []
    tasks = tiny_stream(Runtime())
    for i, task in enumerate(tasks):
        earlier = tuple(tasks[:i]) if method.needs_earlier_data else None
        learn_protected(method, dataclasses.replace(task, earlier=earlier))
        seen += [name for name in task.classes if name not in seen]
        assert sorted(method.classes) == sorted(seen), f"after {task.name} it knows {method.classes}, not {seen}"
        shape = tuple(probe(method).shape)
        assert shape == (18, len(seen)), f"scores are {shape} for {len(seen)} classes"


def nothing_but_images_reaches_predict(c: Checker) -> None:
    """`predict` takes images alone; learning never looks at test data"""
    parameters = list(inspect.signature(c.make().predict).parameters)
    assert len(parameters) == 1, f"predict takes {parameters}"
    c.learned()  # its tasks carry test data that raise when looked at


def small_tasks(c: Checker) -> None:
    """a task of one class, and one with fewer examples than a batch, can be learned"""
    runtime = Runtime()
    tasks = tiny_stream(runtime, (("a", "b"), ("c",), ("d", "e")))
    tasks[2] = dataclasses.replace(tasks[2], train=Pictures("de", 1, seed=5))
    method = c.learned(tasks)
    assert torch.isfinite(probe(method)).all(), "scores are not finite"


def known_classes_come_back(c: Checker) -> None:
    """a class that comes again, alone or beside new ones, keeps its name and place"""
    method = c.learned(tiny_stream(Runtime(), (("a", "b"), ("b", "c"), ("a", "b"))))
    assert sorted(method.classes) == ["a", "b", "c"], f"it knows {method.classes}"
    assert torch.isfinite(probe(method)).all(), "scores are not finite"


def global_generators_untouched(c: Checker) -> None:
    """nothing is drawn from the global generators of torch, numpy or random"""

    def states() -> tuple[Tensor, str, object]:
        # The legacy call is the one way to see numpy's global state.
        return torch.get_rng_state(), repr(np.random.get_state()), random.getstate()  # noqa: NPY002

    before = states()
    probe(c.learned())
    after = states()
    assert torch.equal(before[0], after[0]), "torch's global generator was used"
    assert before[1:] == after[1:], "the global generator of numpy or random was used"


RULES: tuple[Callable[[Checker], None], ...] = (
    backbone_untouched,
    only_own_parameters_trained,
    same_seed_same_result,
    checkpoint_round_trip,
    stopping_between_tasks_changes_nothing,
    stopping_inside_a_task_changes_nothing,
    batch_companions_do_not_matter,
    scores_only_for_classes_seen,
    nothing_but_images_reaches_predict,
    small_tasks,
    known_classes_come_back,
    global_generators_untouched,
)


def check_method(method: str, changes: Sequence[str] = ()) -> list[Outcome]:
    """Run every rule on a method.

    Args:
        method: a built-in's name or PACKAGE.MODULE:CLASS.
        changes: `key=value`: `head=NAME`, `pet=NAME` or `pet=none`, `protect=true` or a key of it, else an option
            of the method.

    Raises:
        UsageError: there is no such method, or it cannot be built with these options.
    """
    content: dict[str, Any] = {
        "method": {"name": method},
        "pet": "lora",
        "train": {"epochs": 2, "batch_size": 8, "lr": 0.01},
    }
    for change in changes:
        top = change.partition("=")[0].partition(".")[0]
        apply_change(content if top in ("head", "pet", "protect") else content["method"], change)
    registry.find("methods", method)
    checker = Checker(make_recipe(content))
    checker.make()
    return [Outcome((rule.__doc__ or rule.__name__).strip(), _fault(rule, checker)) for rule in RULES]


def _fault(rule: Callable[[Checker], None], checker: Checker) -> str | None:
    try:
        rule(checker)
    except PerpetuneError as error:
        return str(error)
    except AssertionError as error:
        return " ".join(str(error).split()) or "it does not hold"
    except Exception as error:  # noqa: BLE001  somebody's method may fail in any way; the next rule is still worth a look
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None
