"""What it costs to look again at the test images of earlier tasks, with kept features and without.

    OMP_NUM_THREADS=1 python benchmarks/evaluate.py
    OMP_NUM_THREADS=1 python benchmarks/evaluate.py --tasks 10 30 --method finetune

Small tasks of two classes on the packaged micro model, two learners in turns in one process: one keeps features
(`evaluate.keep`), one does not. Prints JSON: CPU seconds by part for each number of tasks, and `again`, the share of
all work that is looking again at earlier tasks (their test images and their drift). Both give the same counts.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from perpetune.data.pictures.tables import MemoryTable
from perpetune.data.sources import Source
from perpetune.learner import Learner
from perpetune.seeding import numpy_generator

PARTS = ("prepare_s", "learn_s", "new_s", "earlier_s", "drift_s", "evaluate_s", "commit_s", "report_s")
METHODS: dict[str, dict[str, Any]] = {
    "frozen": {"method": "frozen", "pet": "none", "head": "ridge"},
    "finetune": {"method": "finetune", "pet": {"name": "lora", "rank": 4}, "head": "linear", "train": {"epochs": 1}},
}


class Noise(Source):
    """Two classes of noisy pictures around a pattern, as one small task."""

    def __init__(self, number: int, train: int, test: int):
        self.number, self.counts = number, {"train": train, "test": test}

    def train(self) -> MemoryTable:
        return self._table("train")

    def test(self) -> MemoryTable:
        return self._table("test")

    def _table(self, split: str) -> MemoryTable:
        contents, labels, keys = [], [], []
        for side in "ab":
            label = f"{self.number:03d}{side}"
            pattern = numpy_generator("pattern", label).integers(0, 200, (8, 8, 3)).repeat(4, 0).repeat(4, 1)
            for i in range(self.counts[split]):
                noise = numpy_generator("noise", split, label, i).integers(-40, 40, pattern.shape)
                file = io.BytesIO()
                Image.fromarray((pattern + noise).clip(0, 255).astype(np.uint8)).save(file, "PNG")
                contents.append(file.getvalue())
                labels.append(label)
                keys.append(f"{split}/{label}/{i}")
        return MemoryTable(contents, labels, keys, "noise")


def measured(tasks: int, method: str, train: int, test: int) -> dict[str, Any]:
    """CPU seconds by part over all tasks, and the share of looking again, with kept features and without."""
    content = {"name": "again", "backbone": "perpetune:micro", "run": {"device": "cpu"}, **METHODS[method]}
    with tempfile.TemporaryDirectory() as folder:
        learners = {
            name: Learner({**content, "evaluate": {"keep": keep}}, Path(folder) / name)
            for name, keep in (("kept", 1.0), ("again", 0.0))
        }
        results: dict[str, Any] = {}
        for number in range(tasks):
            for name in learners if number % 2 else reversed(learners):
                results[name] = learners[name].learn(Noise(number, train, test), name=f"t{number:03d}")
    assert results["kept"]["cells"] == results["again"]["cells"]
    assert results["kept"]["drift"] == results["again"]["drift"]
    return {name: told(results[name]) for name in learners}


def told(results: dict[str, Any]) -> dict[str, Any]:
    """The parts of one run, summed over its tasks."""
    sums = {part: round(sum(timing.get(part, 0.0) for timing in results["timings"]), 3) for part in PARTS}
    whole = sum(sums[part] for part in ("prepare_s", "learn_s", "evaluate_s", "commit_s", "report_s"))
    again = sums["earlier_s"] + sums["drift_s"]
    last = results["timings"][-1]
    return {
        **sums,
        "whole_s": round(whole, 3),
        "again": round(again / whole, 3),
        "last_task_earlier_s": last.get("earlier_s", 0.0) + last.get("drift_s", 0.0),
        "looks_per_learning": round(again / max(1e-9, sums["learn_s"]), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tasks", type=int, nargs="+", default=[10, 30, 100])
    parser.add_argument("--method", choices=sorted(METHODS), default="frozen")
    parser.add_argument("--train", type=int, default=5, help="training images of a class")
    parser.add_argument("--test", type=int, default=2, help="test images of a class")
    given = parser.parse_args()
    time.perf_counter = time.process_time  # every part in CPU seconds, whatever else the machine does
    found = {str(count): measured(count, given.method, given.train, given.test) for count in given.tasks}
    json.dump({"method": given.method, "train": given.train, "test": given.test, "tasks": found}, sys.stdout, indent=1)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
