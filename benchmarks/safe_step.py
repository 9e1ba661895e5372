"""What a training image costs in SAFE's two phases, in units of one forward pass of the same model.

    python benchmarks/safe_step.py --threads 1
    python benchmarks/safe_step.py --backbone folder:PATH --architecture NAME --image-size 112 --pet adapter

Both phases go through the product's own loop, on pictures in memory: with `augmented` ones the teacher looks at each
batch, with `deterministic` ones it looks once and its features are kept, which is counted in. The forward pass is that
of evaluation, with the pets in force, over the same pictures in the same batches. In one process and in turns, each
phase between two forward passes; `units` is the median over the turns, of seconds of the clock, and `cpu_units` of
seconds of this process's CPU, which others on the machine disturb less. Prints JSON. `bar` is what issue 4 allows; the
released code needs 5.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from perpetune.build import build_method, load_backbone
from perpetune.fit import fit
from perpetune.methods.base import training
from perpetune.methods.parts.teacher import Teacher
from perpetune.methods.safe import FAST, SLOW, Safe
from perpetune.pets import using
from perpetune.recipe import make_recipe
from perpetune.runtime import Runtime, pick_device
from perpetune.seeding import generator
from perpetune.tasks import Examples, Task, evaluation_batches

BAR = 3.3
CLASSES = 10
PETS: dict[str, dict[str, Any]] = {"adapter": {"width": 64}, "lora": {"rank": 8}}
KINDS = ("augmented", "deterministic")


class Pictures(Examples):
    """Random pictures, held in memory."""

    def __init__(self, count: int, size: int, deterministic: bool):
        rng = generator("pictures", count, size)
        self.pixels = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=rng)
        self.targets = [i % CLASSES for i in range(count)]
        self.deterministic = deterministic

    def __len__(self) -> int:
        return len(self.targets)

    def load(self, index: int, seed: int | None) -> torch.Tensor:
        return self.pixels[index]


class Bench:
    def __init__(self, given: argparse.Namespace):
        self.given = given
        self.runtime = Runtime(device=pick_device(given.device), precision=given.precision)
        backbone = load_backbone(given.backbone, image_size=given.image_size, architecture=given.architecture)
        method = build_method(
            make_recipe(
                {
                    "backbone": given.backbone,
                    "pet": {"name": given.pet, **PETS.get(given.pet, {})},
                    "method": "safe",
                    "head": {"name": "ridge", "projection": 100},
                    "train": {"epochs": given.epochs, "batch_size": given.batch_size, "lr": 1e-4},
                }
            ),
            backbone,
        )
        assert isinstance(method, Safe)
        self.method = method.to(self.runtime.device)
        self.size = backbone.preprocess.size
        for head in (method.model.head, method.slow):
            head.grow([str(c) for c in range(2 * CLASSES)], generator("classes"))
        method.model.seen = list(method.classes)

    def task(self, index: int, kind: str) -> Task:
        names = tuple(str(c) for c in range(CLASSES * index, CLASSES * (index + 1)))
        pictures = Pictures(self.given.images, self.size, kind == "deterministic")
        return Task(index, f"task-{index}", names, pictures, runtime=self.runtime)

    def forward(self, task: Task, name: str | None = FAST) -> None:
        with torch.no_grad(), using(self.method.model, name):
            for batch in evaluation_batches(task.train, self.given.batch_size, self.runtime):
                with self.runtime.autocast():
                    self.method.model.features(batch.inputs)

    def phase(self, name: str, kind: str) -> None:
        """All epochs of `slow` or `fast` training, as `Safe` does it."""
        method, slow = self.method, name == "slow"
        task, config = self.task(0 if slow else 1, kind), method.train_config if slow else method.later
        teacher = Teacher(method.model, None if slow else SLOW)
        if kind == "deterministic":
            teacher.keep(teacher.table(task, config.batch_size))
        loss = partial(method.slow_loss, teacher=teacher)
        if not slow:
            loss = partial(method.fast_loss, teacher=teacher, known=CLASSES)
        with training(method.model):
            fit(loss, method.groups(config), task, config, phase=name)

    def seconds(self, call: Callable[[], Any]) -> tuple[float, float]:
        """Of the clock, and of the CPU."""
        self.wait()
        began, cpu = time.perf_counter(), time.process_time()
        call()
        self.wait()
        return time.perf_counter() - began, time.process_time() - cpu

    def wait(self) -> None:
        if self.runtime.device.type == "cuda":
            torch.cuda.synchronize(self.runtime.device)

    def measure(self) -> dict[str, Any]:
        looked = self.task(0, "augmented")
        cases = [(name, kind) for name in ("slow", "fast") for kind in KINDS]
        units: dict[tuple[str, str], list[tuple[float, float]]] = {case: [] for case in cases}
        forwards, bare = [], []
        self.forward(looked)
        for name, _ in cases[::2]:
            self.phase(name, "augmented")
        for _ in range(self.given.turns):
            before = self.seconds(lambda: self.forward(looked))
            for case in cases:
                took = self.seconds(lambda case=case: self.phase(*case))  # type: ignore[misc]
                after = self.seconds(lambda: self.forward(looked))
                one = [2 * t / self.given.epochs / (b + a) for t, b, a in zip(took, before, after, strict=True)]
                units[case].append((one[0], one[1]))
                forwards.append(after[0])
                before = after
            bare.append(self.seconds(lambda: self.forward(looked, None))[0])
        return {
            "forward_ms": 1e3 * statistics.median(forwards) / self.given.images,
            "forward_without_pets_ms": 1e3 * statistics.median(bare) / self.given.images,
            **{name: {kind: _summary(units[name, kind]) for kind in KINDS} for name in ("slow", "fast")},
        }


def _summary(units: list[tuple[float, float]]) -> dict[str, Any]:
    clock, cpu = zip(*units, strict=True)
    return {"units": statistics.median(clock), "cpu_units": statistics.median(cpu), "all": clock, "all_cpu": cpu}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--backbone", default="perpetune:micro")
    parser.add_argument("--architecture")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--pet", default="adapter")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--precision", choices=["no", "bf16", "fp16"], default="no")
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    bench = Bench(given)
    out = {**vars(given), "device": str(bench.runtime.device), "threads": torch.get_num_threads(), "bar": BAR}
    print(json.dumps({**out, **bench.measure()}, indent=2))


if __name__ == "__main__":
    main()
