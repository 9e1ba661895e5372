"""What a training step with `average:` costs, as a share of a step without.

    python benchmarks/average_step.py --threads 1

The steps go through the product's own loop, on pictures in memory, in turns in one process: a task without an average,
one with a fixed weight, and those whose weight is computed in each step. A task with an average is compared with the
mean of the tasks without one before and after it. The figures are medians over the turns: `cpu` of seconds of this
process's CPU, which others on the machine disturb less, and `clock`. `alone_ms` is what the average itself adds to a
step of the optimizer. Prints JSON. `bar` is what issue 15 allows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch

from perpetune.averages.average import Average
from perpetune.averages.config import AverageConfig
from perpetune.build import build_method, load_backbone
from perpetune.learning import learn_protected
from perpetune.methods.base import Method
from perpetune.recipe import make_recipe
from perpetune.runtime import Runtime, pick_device
from perpetune.tasks import Task
from safe_step import CLASSES, Pictures

BARS = {"fixed": 1.02, "dynamic": 1.05, "curvature": 1.05}
WAYS: dict[str, dict[str, Any]] = {
    "fixed": {"weight": 0.99},
    "dynamic": {"weight": "dynamic"},
    "curvature": {"weight": "curvature"},
}


class Bench:
    def __init__(self, given: argparse.Namespace):
        self.given = given
        self.runtime = Runtime(device=pick_device(given.device))
        self.methods = {name: self.method(average) for name, average in {"none": None, **WAYS}.items()}

    def method(self, average: dict[str, Any] | None) -> Method:
        backbone = load_backbone(self.given.backbone)
        self.size = backbone.preprocess.size
        content = {
            "backbone": self.given.backbone,
            "pet": {"name": "lora", "at": ["q", "v"], "rank": 8},
            "train": {"epochs": 1, "batch_size": self.given.batch_size, "lr": 1e-4},
            "average": None if average is None else {**average, "first": 1},
        }
        return build_method(make_recipe(content), backbone).to(self.runtime.device)

    def seconds(self, name: str) -> tuple[float, float]:
        """Of the CPU and of the clock, for one task."""
        names = tuple(str(c) for c in range(CLASSES))
        task = Task(1, "task", names, Pictures(self.given.images, self.size, deterministic=False), runtime=self.runtime)
        self.wait()
        began, cpu = time.perf_counter(), time.process_time()
        learn_protected(self.methods[name], task)
        self.wait()
        return time.process_time() - cpu, time.perf_counter() - began

    def wait(self) -> None:
        if self.runtime.device.type == "cuda":
            torch.cuda.synchronize(self.runtime.device)

    def measure(self) -> dict[str, Any]:
        for name in self.methods:
            self.seconds(name)
        ratios: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
        bare = [self.seconds("none")]
        for _ in range(self.given.turns):
            for name in WAYS:
                took = self.seconds(name)
                bare.append(self.seconds("none"))
                before, after = bare[-2:]
                ratios[name].append((2 * took[0] / (before[0] + after[0]), 2 * took[1] / (before[1] + after[1])))
        steps = -(-self.given.images // self.given.batch_size)
        return {
            "step_ms": 1e3 * statistics.median(cpu for cpu, _ in bare) / steps,
            **{
                name: {
                    "cpu": statistics.median(cpu for cpu, _ in found),
                    "clock": statistics.median(clock for _, clock in found),
                    "alone_ms": self.alone(name),
                    "bar": BARS[name],
                }
                for name, found in ratios.items()
            },
        }

    def alone(self, name: str, steps: int = 200) -> float:
        """Milliseconds of the CPU that the average adds to a step of the optimizer, without forward and backward."""
        method = self.method(None)
        parameters = [p for group, _ in method.groups(method.train_config)[:1] for p in group]  # type: ignore[attr-defined]
        for p in parameters:
            p.requires_grad_(True)
            p.grad = torch.randn_like(p) * 1e-3
        spent = []
        for turn in range(2):
            optimizer = torch.optim.AdamW(parameters, lr=1e-4)
            average = Average(method.model, method.trained, AverageConfig.model_validate({**WAYS[name], "first": 1}))
            average.begin(0)
            began = time.process_time()
            if turn:
                with average.beside(optimizer):
                    for _ in range(steps):
                        optimizer.step()
            else:
                for _ in range(steps):
                    optimizer.step()
            self.wait()
            spent.append(time.process_time() - began)
        return 1e3 * (spent[1] - spent[0]) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--backbone", default="perpetune:micro")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    bench = Bench(given)
    out = {**vars(given), "device": str(bench.runtime.device), "threads": torch.get_num_threads()}
    print(json.dumps({**out, **bench.measure()}, indent=2))


if __name__ == "__main__":
    main()
