"""`fit` against a loop written by hand, and what it promises beside the weights."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import perpetune.runtime
from perpetune.build import build_runtime
from perpetune.check import Checker, probe, tiny_stream
from perpetune.errors import Interrupted, PerpetuneError, UsageError
from perpetune.fit import FitConfig, fit
from perpetune.recipe import make_recipe
from perpetune.runtime import Runtime, Silent
from perpetune.seeding import generator, seed_of
from perpetune.snapshot import restore, snapshot, tensors
from perpetune.state import MidTask
from perpetune.tasks import Batch, Examples, Task

N, CLASSES = 21, 3  # no multiple of any batch size here


class Points(Examples):
    """Labelled points; what was asked for is written down."""

    def __init__(self, n: int = N):
        self.x = torch.randn(n, 5, generator=generator("points"), dtype=torch.float64)
        self.targets = torch.randint(0, CLASSES, (n,), generator=generator("labels")).tolist()
        self.asked: list[tuple[int, int | None]] = []

    def __len__(self) -> int:
        return len(self.targets)

    def load(self, index: int, seed: int | None) -> Tensor:
        self.asked.append((index, seed))
        return self.x[index]


class Net(nn.Module):
    """A body and a head, all frozen, as the library hands them over."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        rng = generator("net")
        self.body = nn.Parameter(torch.randn(5, 8, generator=rng).to(dtype), requires_grad=False)
        self.head = nn.Parameter(torch.randn(8, CLASSES, generator=rng).to(dtype), requires_grad=False)
        self.rest = nn.Parameter(torch.ones(8, dtype=dtype), requires_grad=False)

    def loss(self, task: Task, batch: Batch) -> Tensor:
        return self.value(batch.inputs.pixels, batch.targets)

    def value(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = torch.tanh(x.to(self.body.dtype) @ self.body) * self.rest
        return F.cross_entropy(hidden @ self.head, y)


def task_of(examples: Points | None = None, **runtime: Any) -> Task:
    train: Any = Points() if examples is None else examples
    return Task(3, "points", ("a", "b", "c"), train, runtime=Runtime(seed=7, **runtime))


def test_epochs_can_be_given_for_each_task_and_the_last_go_on() -> None:
    config = FitConfig(epochs=[1, 0, 4, 2], batch_size=8)
    assert [config.epochs_of(i) for i in range(6)] == [1, 0, 4, 2, 2, 2]
    by_task, plain = trained(config), trained(FitConfig(epochs=2, batch_size=8))  # the task is number 3
    assert torch.equal(by_task.body, plain.body)


def trained(config: FitConfig, task: Task | None = None, dtype: torch.dtype = torch.float32) -> Net:
    net = Net(dtype)
    fit(net.loss, [([net.body], config.lr), ([net.head], config.head_lr or config.lr)], task or task_of(), config)
    return net


def by_hand(config: FitConfig, dtype: torch.dtype = torch.float32) -> Net:
    """The plain loop that `fit` has to equal."""
    net, data = Net(dtype), Points()
    net.body.requires_grad_(True)
    net.head.requires_grad_(True)
    groups = [{"params": [net.body], "lr": config.lr}, {"params": [net.head], "lr": config.head_lr or config.lr}]
    if config.optimizer == "sgd":
        optimizer: Any = torch.optim.SGD(groups, momentum=config.momentum, weight_decay=config.weight_decay)
    else:
        optimizer = torch.optim.AdamW(groups, betas=config.betas, weight_decay=config.weight_decay)
    total = config.epochs_of(3) * math.ceil(N / config.batch_size)
    warm = config.warmup * total

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / (warm + 1)
        left = (total - step) / max(1.0, total - warm)
        return {"constant": 1.0, "linear": left, "cosine": (1 + math.cos(math.pi * (1 - left))) / 2}[config.schedule]

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for epoch in range(config.epochs_of(3)):
        rng = torch.Generator().manual_seed(seed_of(7, "task", 3, "train", "order", epoch))
        for rows in torch.randperm(N, generator=rng).split(config.batch_size):
            value = net.value(data.x[rows], torch.tensor(data.targets)[rows])
            value.backward()
            if config.clip is not None:
                nn.utils.clip_grad_norm_([net.body, net.head], config.clip)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    return net


def assert_same(found: Net, expected: Net, tolerance: float = 0.0) -> None:
    for name in ("body", "head", "rest"):
        difference = (getattr(found, name) - getattr(expected, name)).abs().max().item()
        assert difference <= tolerance, f"{name} differs by {difference}"
    assert not torch.equal(found.body, Net(found.body.dtype).body), "nothing was trained"


LOOPS = [
    # The schedules whose factors are the same floating-point operations in both loops give the same bits.
    ({"optimizer": "adamw", "schedule": "constant"}, 0.0),
    ({"optimizer": "sgd", "schedule": "constant", "momentum": 0.8}, 0.0),
    ({"optimizer": "sgd", "schedule": "constant", "momentum": 0.0, "weight_decay": 0.1}, 0.0),
    ({"optimizer": "adamw", "schedule": "constant", "clip": 0.1, "head_lr": 0.1}, 0.0),
    ({"optimizer": "adamw", "schedule": "constant", "warmup": 0.25, "betas": (0.8, 0.95), "weight_decay": 0.3}, 0.0),
    ({"optimizer": "sgd", "schedule": "constant", "warmup": 0.25, "clip": 0.05, "head_lr": 0.2}, 0.0),
    ({"optimizer": "adamw", "schedule": "cosine"}, 1e-6),
    ({"optimizer": "sgd", "schedule": "cosine", "warmup": 0.2, "clip": 0.3, "weight_decay": 0.01}, 1e-6),
    ({"optimizer": "adamw", "schedule": "linear", "warmup": 0.5, "head_lr": 0.2}, 1e-6),
    ({"optimizer": "sgd", "schedule": "linear", "batch_size": 64}, 1e-6),
    ({"optimizer": "adamw", "schedule": "linear", "batch_size": 1, "epochs": 1}, 1e-6),
]


@pytest.mark.parametrize(
    ("options", "tolerance"),
    LOOPS,
    ids=str,
)
def test_it_trains_as_a_plain_loop_does(options: dict[str, Any], tolerance: float) -> None:
    config = FitConfig.model_validate({"epochs": 3, "batch_size": 4, "lr": 0.03, **options})
    assert_same(trained(config), by_hand(config), tolerance)


@pytest.mark.parametrize("accumulate", [2, 3, 50])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_micro_batches_add_up_to_the_whole_batch(accumulate: int, optimizer: str) -> None:
    config = FitConfig(epochs=3, batch_size=8, lr=0.03, clip=0.5, optimizer=optimizer)  # type: ignore[arg-type]
    cut = config.model_copy(update={"accumulate": accumulate})
    assert_same(trained(cut, dtype=torch.float64), trained(config, dtype=torch.float64), 1e-6)


def test_micro_batches_have_the_size_that_memory_asks_for() -> None:
    sizes: list[int] = []
    net = Net()

    def loss(task: Task, batch: Batch) -> Tensor:
        sizes.append(len(batch))
        return net.loss(task, batch)

    fit(loss, [net.head], task_of(), FitConfig(epochs=1, batch_size=8, accumulate=3))
    assert sizes == [3, 3, 2, 3, 3, 2, 2, 2, 1]


def test_loader_processes_change_nothing() -> None:
    config = FitConfig(epochs=2, batch_size=4, lr=0.03)
    assert_same(trained(config, task_of(workers=2)), trained(config))


def test_each_epoch_sees_every_example_once_with_a_seed_of_its_own() -> None:
    data = Points()
    trained(FitConfig(epochs=3, batch_size=4), task_of(data))
    epochs = [data.asked[i : i + N] for i in range(0, len(data.asked), N)]
    assert len(epochs) == 3
    for epoch in epochs:
        assert sorted(i for i, _ in epoch) == list(range(N))
    orders = [tuple(i for i, _ in epoch) for epoch in epochs]
    assert len(set(orders)) == 3
    assert len({seed for _, seed in data.asked}) == 3 * N, "an augmentation seed comes twice"
    again = Points()
    trained(FitConfig(epochs=3, batch_size=4), task_of(again))
    assert again.asked == data.asked
    other = Points()
    net = Net()
    fit(net.loss, [net.head], task_of(other), FitConfig(epochs=3, batch_size=4), phase="second")
    assert not {seed for _, seed in other.asked} & {seed for _, seed in data.asked}, "two phases share seeds"


class From:
    """Checkpoints that say how many steps are done."""

    seconds, images, every = 0.0, 0, 1000

    def __init__(self, done: int | None):
        self.done, self.calls = done, list[str]()

    def begin(self, phase: str, optimizer: Any, accelerator: Any) -> int | None:
        self.calls.append(f"begin {phase}")
        return self.done

    def step(self, done: int, total: int, images: int, tokens: int, *, force: bool) -> None:
        self.calls.append(f"step {done} of {total}, {images} images" + (", forced" if force else ""))

    def finish(self) -> None:
        self.calls.append("finish")


@pytest.mark.parametrize("done", [1, 5, 6, 7, 12, 18])
def test_resumed_anywhere_it_asks_for_the_rest_of_the_same_examples_and_seeds(done: int) -> None:
    whole, rest = Points(), Points()
    config = FitConfig(epochs=3, batch_size=4)  # 6 steps an epoch, the last on one example
    trained(config, task_of(whole))
    trained(config, task_of(rest, checkpoints=From(done)))
    assert rest.asked == whole.asked[done // 6 * N + done % 6 * 4 :]


def test_a_finished_phase_is_not_repeated() -> None:
    data, checkpoints = Points(), From(None)
    net = Net()
    fit(net.loss, [net.head], task_of(data, checkpoints=checkpoints), FitConfig())
    assert data.asked == []
    assert checkpoints.calls == ["begin train"]
    assert not net.head.requires_grad


def test_checkpoints_hear_of_every_step() -> None:
    checkpoints = From(0)
    trained(FitConfig(epochs=1, batch_size=10), task_of(checkpoints=checkpoints))
    steps = ["step 1 of 3, 10 images", "step 2 of 3, 10 images", "step 3 of 3, 1 images"]
    assert checkpoints.calls == ["begin train", *steps, "finish"]


def test_a_signal_stops_it_after_the_step_with_a_checkpoint_forced() -> None:
    checkpoints = From(0)
    asked = iter([None, 15])
    task = task_of(checkpoints=checkpoints, stopping=lambda: next(asked))
    with pytest.raises(Interrupted, match=r"task points, phase train, after step 2 of 6") as stop:
        trained(FitConfig(epochs=1, batch_size=4), task)
    assert stop.value.exit_code == 143
    assert checkpoints.calls[-1] == "step 2 of 6, 4 images, forced"


class Steps(Silent):
    """Writes down the steps it is told of."""

    def __init__(self) -> None:
        self.phases: list[Any] = []
        self.steps: list[Any] = []

    def phase(self, phase: str, steps: int, epochs: int, done: int) -> None:
        self.phases.append((phase, steps, epochs, done))

    def step(self, done: int, epoch: int, loss: float | None, images: int) -> None:
        self.steps.append((done, epoch, loss is not None, images))


def test_progress_hears_of_every_step_and_every_image() -> None:
    progress = Steps()
    trained(FitConfig(epochs=2, batch_size=4), task_of(progress=progress))
    assert progress.phases == [("train", 12, 2, 0)]
    assert [s[0] for s in progress.steps] == list(range(1, 13))
    assert [s[1] for s in progress.steps] == [0] * 6 + [1] * 6
    assert [s[0] for s in progress.steps if s[2]] == [10, 12]  # looking at the loss waits for the device
    assert sum(s[3] for s in progress.steps) == 2 * N


def breaks_at(net: Net, step: int, value: float) -> Callable[[Task, Batch], Tensor]:
    count = iter(range(10_000))
    return lambda task, batch: net.loss(task, batch) * (value if next(count) == step else 1.0)


@pytest.mark.parametrize(("value", "word"), [(math.nan, "nan"), (math.inf, "inf")])
def test_a_loss_that_is_not_finite_is_told_in_one_line(value: float, word: str) -> None:
    net = Net()
    with pytest.raises(PerpetuneError) as caught:  # the last step of epoch 2
        fit(breaks_at(net, 11, value), [net.body, net.head], task_of(), FitConfig(epochs=2, batch_size=4), phase="body")
    message = str(caught.value)
    assert f"the loss became {word} in task points, phase body, epoch 2, by step 12" in message
    assert "\n" not in message
    assert caught.value.exit_code == 1
    assert not any(p.requires_grad or p.grad is not None for p in net.parameters())


def test_a_loss_that_was_not_finite_once_is_found_within_ten_steps() -> None:
    net = Net()
    with pytest.raises(PerpetuneError, match="epoch 2, by step 10"):
        fit(breaks_at(net, 2, math.nan), [net.body], task_of(), FitConfig(epochs=9, batch_size=4))


def test_an_error_inside_the_loss_leaves_no_gradient_on() -> None:
    net = Net()
    calls = iter(range(10))

    def loss(task: Task, batch: Batch) -> Tensor:
        assert net.body.requires_grad
        assert net.head.requires_grad
        assert not net.rest.requires_grad
        if next(calls) == 2:
            raise KeyError("mine")
        return net.loss(task, batch)

    with pytest.raises(KeyError, match="mine"):
        fit(loss, [net.body, net.head], task_of(), FitConfig(batch_size=4))
    assert not any(p.requires_grad or p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("case", ["no epochs", "no parameters", "empty groups", "no examples"])
def test_nothing_to_do_is_nothing_done(case: str) -> None:
    net, data, checkpoints = Net(), Points(0 if case == "no examples" else N), From(0)
    parameters: Any = {"no parameters": [], "empty groups": [([], 0.1), ([], 0.2)]}.get(case, [net.body, net.head])
    before = (snapshot_of(net), torch.get_rng_state())
    epochs = 0 if case == "no epochs" else 2
    fit(net.loss, parameters, task_of(data, checkpoints=checkpoints), FitConfig(epochs=epochs))
    assert snapshot_of(net) == before[0]
    assert data.asked == []
    assert checkpoints.calls == []


def snapshot_of(net: nn.Module) -> list[Any]:
    return [t.tolist() for t in net.state_dict().values()]


def test_a_loss_that_draws_gets_the_same_numbers_again_and_leaves_the_callers_alone() -> None:
    drawn: list[list[float]] = [[], []]
    for k, done in enumerate((0, 4)):
        net = Net()

        def loss(task: Task, batch: Batch, to: list[float] = drawn[k], net: Net = net) -> Tensor:
            to.append(float(torch.rand(())))
            return net.loss(task, batch)

        torch.manual_seed(5)
        before = torch.get_rng_state()
        fit(loss, [net.body], task_of(checkpoints=From(done)), FitConfig(epochs=2, batch_size=4))
        assert torch.equal(torch.get_rng_state(), before)
    assert drawn[1] == drawn[0][4:]
    assert len(set(drawn[0])) == 12


def dropping(dropout: float, **changes: Any) -> Checker:
    pet = {"name": "lora", "rank": 2, "dropout": dropout}
    return Checker(make_recipe({"pet": pet, "train": {"epochs": 2, "batch_size": 8, "lr": 0.01}, **changes}))


def test_dropout_acts_while_training_and_only_there() -> None:
    checker, plain = dropping(0.5), dropping(0.0)
    method = checker.learned()
    assert not torch.equal(probe(method), probe(plain.learned())), "dropout did nothing"
    assert torch.equal(probe(method), probe(method)), "dropout acts at prediction"
    assert not any(m.training for m in method.modules())


def test_a_method_that_fails_is_left_in_evaluation_mode() -> None:
    checker = dropping(0.5)
    method = checker.make()
    task = tiny_stream(Runtime())[0]
    task.train.targets = ["not a number"] * len(task.train)  # type: ignore[misc]
    with pytest.raises((TypeError, ValueError)):
        method.learn(task)
    assert not any(m.training for m in method.modules())
    assert not any(p.requires_grad for p in method.parameters())


def test_dropout_draws_nothing_from_the_global_generators() -> None:
    checker = dropping(0.5)
    torch.manual_seed(11)
    random.seed(11)
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[index]  # noqa: NPY002
    checker.learned()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]  # type: ignore[index]  # noqa: NPY002
    torch.manual_seed(12)
    assert torch.equal(probe(checker.learned()), probe(checker.learned()))


@pytest.mark.parametrize("stop", [1, 4, 5])
def test_a_run_with_dropout_resumes_bit_for_bit_from_the_middle_of_a_phase(stop: int, tmp_path: Path) -> None:
    checker = dropping(0.4)
    tasks = tiny_stream(Runtime())[:1]  # 6 steps
    whole = checker.learn(checker.make(), tasks)
    asked = iter(range(1, 100))
    runtime = Runtime(stopping=lambda: 15 if next(asked) >= stop else None)
    first, task = checker.make(), dataclasses.replace(tasks[0], runtime=runtime)
    runtime.checkpoints = MidTask(tmp_path / "resume", first, (0, task.name, ""), 100)
    with pytest.raises(Interrupted, match=f"after step {stop} of 6"):
        first.learn(task)
    second = checker.make()
    torch.rand(stop)  # where the global generator stands is of no account
    runtime.checkpoints = MidTask(tmp_path / "resume", second, (0, task.name, ""), 100)
    runtime.stopping = lambda: None
    second.learn(task)
    for file, group in tensors(whole).items():
        for name, tensor in group.items():
            assert torch.equal(tensors(second)[file][name], tensor), name


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast_on_the_cpu(precision: str) -> None:
    recipe = make_recipe({"run": {"precision": precision, "device": "cpu"}, "train": {"epochs": 2, "lr": 0.01}})
    try:
        runtime = build_runtime(recipe)
    except UsageError as error:  # an accelerate that has no fp16 on the CPU
        assert f"run.precision '{precision}' cannot be used on cpu" in str(error)  # noqa: PT017
        return
    checker = Checker(recipe)
    method = checker.learned(tiny_stream(runtime))
    scores, exact = probe(method), probe(checker.learned(tiny_stream(Runtime())))
    assert scores.dtype == torch.float32
    assert torch.isfinite(scores).all()
    assert not torch.equal(scores, exact), "nothing ran in the lower precision"
    assert all(t.dtype == torch.float32 for n, t in tensors(method)["pet.safetensors"].items())
    torch.testing.assert_close(scores, exact, rtol=0.2, atol=0.2)


def test_a_precision_that_accelerate_refuses_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: Any) -> Any:
        raise ValueError("fp16 mixed precision requires a GPU (not 'cpu').\nAnd more.")

    monkeypatch.setattr("accelerate.Accelerator", refuse)
    with pytest.raises(UsageError) as caught:
        build_runtime(make_recipe({"run": {"precision": "fp16", "device": "cpu"}}))
    assert str(caught.value) == (
        "run.precision 'fp16' cannot be used on cpu: fp16 mixed precision requires a GPU (not 'cpu').; `no` can"
    )


def test_runs_of_different_precision_follow_each_other_in_one_process() -> None:
    for precision in ("no", "bf16", "no"):
        runtime = build_runtime(make_recipe({"run": {"precision": precision, "device": "cpu"}}))
        assert (runtime.rank, runtime.world, runtime.device) == (0, 1, torch.device("cpu"))
        trained(FitConfig(epochs=1), dataclasses.replace(task_of(), runtime=runtime))


def scaled() -> Task:
    """A task whose runtime scales the loss as fp16 on a GPU does; the CPU has such a scaler as well."""
    task = task_of()
    task.runtime.accelerator.scaler = torch.amp.GradScaler("cpu")
    return task


@pytest.mark.parametrize("clip", [None, 0.1])
def test_a_scaled_loss_gives_the_same_weights_in_every_phase(clip: float | None) -> None:
    config = FitConfig(epochs=2, batch_size=4, lr=0.03, clip=clip)
    nets = Net(torch.float64), Net(torch.float64)
    for net, task in zip(nets, (scaled(), task_of()), strict=True):
        for phase in ("one", "two", "three"):  # the same parameters under a new optimizer each time
            fit(net.loss, [net.body, net.head], task, config, phase=phase)
    assert_same(*nets, 1e-9)


def test_the_scale_starts_anew_in_each_phase() -> None:
    task = scaled()
    scaler = task.runtime.accelerator.scaler
    assert scaler is not None
    scaler.scale(torch.ones(()))
    scaler.update(4.0)  # as if an earlier phase had found it
    trained(FitConfig(epochs=1, batch_size=4), task)
    assert scaler.get_scale() == 65536.0


def test_a_step_that_overflows_is_left_out() -> None:
    net = Net()
    calls = iter(range(100))

    def loss(task: Task, batch: Batch) -> Tensor:
        value = net.loss(task, batch)
        if next(calls) == 1:  # a finite loss whose gradient is not
            value = value + (torch.sqrt((net.body * 0).sum()) * 0).nan_to_num()
        return value

    fit(loss, [net.body, net.head], scaled(), FitConfig(epochs=1, batch_size=4, lr=0.03))
    assert all(torch.isfinite(p).all() for p in net.parameters())


def test_memory_of_a_phase_is_given_back() -> None:
    import gc
    import weakref

    net, task, seen = Net(), task_of(), list[Any]()
    begin = From(0)

    def keep(phase: str, optimizer: Any, accelerator: Any) -> int:
        seen.append(weakref.ref(optimizer))
        return 0

    begin.begin = keep  # type: ignore[method-assign]
    task.runtime.checkpoints = begin
    for phase in ("one", "two"):
        fit(net.loss, [net.body], task, FitConfig(epochs=1), phase=phase)
    gc.collect()
    assert [ref() for ref in seen] == [None, None]


def test_a_named_device_is_the_one_that_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate's own choice is taken only where a launcher decides."""
    assert perpetune.runtime.pick_device("cpu") == torch.device("cpu")
    with pytest.raises(UsageError, match=r"run.device 'meta' cannot be used here"):
        build_runtime(make_recipe({"run": {"device": "meta"}}))
    with contextlib.ExitStack() as stack:
        if torch.cuda.is_available():
            stack.callback(torch.cuda.set_device, torch.cuda.current_device())
            last = f"cuda:{torch.cuda.device_count() - 1}"
            assert build_runtime(make_recipe({"run": {"device": last}})).device == torch.device(last)


def roundtrip(checker: Checker) -> Sequence[Tensor]:
    method = checker.learned()
    other = checker.make()
    restore(other, snapshot(method), "memory")
    return [probe(method), probe(other)]


def test_what_dropout_trained_is_stored_as_anything_else() -> None:
    first, second = roundtrip(dropping(0.5, head="cosine"))
    assert torch.equal(first, second)


def test_no_checkpoint_is_written_after_a_loss_that_was_not_seen_to_be_finite() -> None:
    """Else going on from it would fail for ever: with a checkpoint at every third step, the looks come that often."""
    saved: list[int] = []

    class Every(From):
        every = 3

        def step(self, done: int, total: int, images: int, tokens: int, *, force: bool) -> None:
            if done % 3 == 0:
                saved.append(done)

    steps = iter(range(1000))

    def loss(task: Task, batch: Batch) -> Tensor:
        factor = float("nan") if next(steps) >= 4 else 1.0
        return (weight * factor).sum()

    weight = nn.Parameter(torch.ones(2))
    task = tiny_stream(Runtime(checkpoints=Every(0)))[0]
    with pytest.raises(PerpetuneError, match="the loss became nan"):
        fit(loss, [weight], task, FitConfig(epochs=9, batch_size=8))
    assert saved == [3]
