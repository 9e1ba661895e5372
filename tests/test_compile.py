"""`run.compile`: blocks through torch.compile give the answers of the blocks themselves, whatever is in force."""

from __future__ import annotations

import copy
from collections.abc import Callable
from shutil import which
from typing import Any

import pytest
import torch
from test_waits import kind, recipe
from torch import Tensor

from perpetune.build import build_method
from perpetune.check.kind import TinyKind
from perpetune.learner import Learner
from perpetune.learning import learn_protected
from perpetune.methods.base import Method
from perpetune.models.backbone import Backbone
from perpetune.models.compiled import CompiledForward, Compiler, can_compile, compile_blocks
from perpetune.pets import Choice, LoRA, copy_set, pets, remove, slots, using
from perpetune.runtime import Runtime
from perpetune.seeding import generator
from perpetune.tasks import Inputs


class Counted:
    """A backend of torch.compile that runs graphs as they are, and counts those that it gets."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward  # type: ignore[no-any-return]


def drawn(method: Method, name: str, seed: int) -> None:
    """Values of a set that change what it computes."""
    with torch.no_grad():
        for number, pet in enumerate(pets(method.model, name)):
            for p in pet.parameters():
                p.copy_(0.3 * torch.randn(p.shape, generator=generator("values", seed, number)))


class World:
    """A model whose blocks are compiled, and its uncompiled copy."""

    def __init__(self, of: TinyKind, compiler: Compiler | None = None, **changes: Any):
        torch.compiler.reset()
        self.counted = Counted()
        self.method = build_method(recipe(**changes), of.backbone())
        for name in ("one", "two"):
            copy_set(self.method.model, "default", name)
        for seed, name in enumerate(("default", "one", "two")):
            drawn(self.method, name, seed)
        self.compiler = compiler or Compiler(backend=self.counted)
        assert compile_blocks(self.method.model.backbone, self.compiler) == ""
        self.inputs = of.asked(["a", "b"])

    @property
    def backbone(self) -> Backbone:
        return self.method.model.backbone

    def both(self, names: Any) -> tuple[Tensor, Tensor]:
        """Features with the sets in force: of compiled blocks, and of the blocks themselves."""
        with torch.no_grad(), using(self.method.model, names):
            compiled, before = self.backbone.features(self.inputs), self.compiler.failed
            self.compiler.failed = True
            plain = self.backbone.features(self.inputs)
            self.compiler.failed = before
        return compiled, plain


def choice(inputs: Inputs) -> Choice:
    return Choice(("one", "two"), torch.arange(len(inputs))[:, None] % 2)


def check_switches(world: World) -> None:
    """Each way in which what a block computes can change, checked after the block was compiled before it."""
    seen: list[Tensor] = []
    for names in (None, "default", "one", ("one", "two"), None, choice(world.inputs), "default"):
        compiled, plain = world.both(names)
        assert torch.allclose(compiled, plain, atol=1e-5), names
        seen.append(plain)
    assert not torch.allclose(seen[0], seen[1], atol=1e-3), "control: sets differ"
    drawn(world.method, "default", 9)
    assert torch.allclose(*world.both("default"), atol=1e-5)
    loras = [pet for pet in pets(world.method.model, "default") if isinstance(pet, LoRA)]
    before = world.both("default")[1]
    for pet in loras:
        pet.renew(torch.randn(pet.down.shape, generator=generator("start")))
    assert torch.allclose(*world.both("default"), atol=1e-5), "a resting product acts beside the pair"
    assert torch.allclose(world.both("default")[0], before, atol=1e-4), "which has changed no output"
    for pet in loras:
        pet.resize(3)
        pet.restart(generator("again"))
        for up in pet.up:
            torch.nn.init.normal_(up)
    assert torch.allclose(*world.both("default"), atol=1e-5), "the resting product is gone, and the rank is another"


@pytest.mark.parametrize("of", ["pictures", pytest.param("texts", marks=pytest.mark.slow)])
def test_what_is_in_force_is_what_answers(of: str) -> None:
    world = World(kind(of), **({"head": "lm"} if of == "texts" else {}))
    check_switches(world)
    assert world.counted.graphs > 0, "control: something was compiled"
    assert len(world.backbone.tower.blocks) == 2


def test_control_a_stale_graph_is_found() -> None:
    class Stale(Compiler):
        """Compiles without torch's guards, so the first graph answers for ever."""

        def __call__(self, block: Any, args: Any, kwargs: Any) -> Any:
            if type(block) not in self._made:
                options = {"guard_filter_fn": lambda guards: [False for _ in guards]}
                self._made[type(block)] = torch.compile(type(block).forward, backend="eager", options=options)
            return self._made[type(block)](block, *args, **kwargs)

    with pytest.raises(AssertionError):
        check_switches(World(kind("pictures"), Stale()))


def test_gradients_are_the_same() -> None:
    world, found = World(kind("pictures")), []
    trained = [p.requires_grad_(True) for pet in pets(world.method.model, "default") for p in pet.parameters()]
    for failed in (False, True):
        world.compiler.failed = failed
        with using(world.method.model, "default"):
            features = world.backbone.features(world.inputs)
        found.append(torch.autograd.grad(features.square().sum(), trained))
    assert world.counted.graphs > 0
    torch.testing.assert_close(*found)


def test_blocks_of_one_class_are_compiled_once() -> None:
    world = World(kind("pictures"))
    for names in ("default", None, "default", None):
        world.both(names)
    assert world.counted.graphs == 2, "one for each state of the pets, not for each block"


@pytest.mark.slow
def test_training_and_protection_are_the_same_with_it() -> None:
    """Protection watches features inside blocks, which then run as they are."""
    learned = []
    for compiled in (True, False):
        world = World(kind("pictures"), Compiler(backend="aot_eager"), protect={"energy": 0.9})
        world.compiler.failed = not compiled
        for name in ("one", "two"):
            remove(world.method.model, name)
        for task in kind("pictures").stream(Runtime())[:2]:
            learn_protected(world.method, task)
        learned.append([p.detach().clone() for p in world.method.parameters()])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*learned, strict=True))
    assert not torch.equal(learned[0][-1], torch.zeros_like(learned[0][-1]))


def test_hooks_and_watchers_see_what_they_saw() -> None:
    world = World(kind("pictures"))
    world.both("default")
    graphs, calls = world.counted.graphs, []
    slot = next(slot for _, slot in slots(world.method.model))
    hook = slot.register_forward_hook(lambda *_: calls.append(1))
    block = world.backbone.tower.blocks[0]
    assert not can_compile(block)
    with torch.no_grad(), using(world.method.model, "default"):
        world.backbone.features(world.inputs)
    hook.remove()
    assert calls == [1]
    assert can_compile(block)
    assert world.counted.graphs == graphs


def test_a_pet_that_does_more_runs_as_it_is() -> None:
    world = World(kind("pictures"), pet="prefix")
    assert torch.equal(*world.both("default"))
    assert world.counted.graphs == 0
    world.both(None)
    assert world.counted.graphs == 1


def test_a_copy_has_its_own_blocks() -> None:
    world = World(kind("pictures"))
    other = copy.deepcopy(world.method)
    drawn(other, "default", 5)
    with torch.no_grad(), using(world.method.model, "default"), using(other.model, "default"):
        mine, theirs = (m.model.backbone.features(world.inputs) for m in (world.method, other))
    assert not torch.allclose(mine, theirs, atol=1e-3)
    forward = other.model.backbone.tower.blocks[0].forward
    assert isinstance(forward, CompiledForward)
    assert forward.block is other.model.backbone.tower.blocks[0]


def test_a_compiler_that_is_missing_is_said_once() -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no C++ compiler is here")

    world = World(kind("pictures"), Compiler(backend=broken))
    with pytest.warns(UserWarning, match="cannot be compiled here.*no C\\+\\+ compiler"):
        compiled, plain = world.both("default")
    assert torch.equal(compiled, plain)
    assert world.compiler.failed


def test_a_fault_of_the_model_is_not_hidden() -> None:
    world = World(kind("pictures"))
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        world.backbone.features(Inputs(pixels=torch.zeros(2, 3, 5, 5, dtype=torch.uint8)))
    assert not world.compiler.failed


def test_states_are_the_same_with_it(tmp_path: Any) -> None:
    plain = recipe(data={"name": "digits"}, stream={"classes_per_task": 5, "train_per_class": 4, "test_per_class": 1})
    with_it = plain.model_copy(update={"run": plain.run.model_copy(update={"compile": True})})
    one, other = Learner(plain, tmp_path / "a"), Learner(with_it, tmp_path / "b")
    assert one.backbone.fingerprint() == other.backbone.fingerprint()
    assert list(one.method.state_dict()) == list(other.method.state_dict())
    assert isinstance(other.backbone.tower.blocks[0].forward, CompiledForward)


@pytest.mark.slow
@pytest.mark.skipif(which("g++") is None and which("clang++") is None, reason="there is no C++ compiler")
def test_the_real_compiler() -> None:
    check_switches(World(kind("pictures"), Compiler()))
