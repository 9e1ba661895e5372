"""How often the program waits for the device in steps 3 to 5, and in passes over data, for each path.

    python benchmarks/waits.py                     # all paths
    python benchmarks/waits.py treelora l2p        # some

With a GPU, CUDA itself reports waits (`torch.cuda.set_sync_debug_mode`). Without one, `perpetune.check.waits` counts
operations that would wait; of these `late` waits are for work that was queued long before. Prints JSON.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections import Counter
from typing import Any

import torch

from perpetune.build import build_method
from perpetune.check.pictures import TinyPictures
from perpetune.check.survey import At, in_batches, in_steps, survey
from perpetune.check.texts import TinyTexts
from perpetune.learning import learn_protected
from perpetune.methods.base import Method
from perpetune.recipe import make_recipe
from perpetune.runtime import Runtime, Silent
from perpetune.tasks import Task

TRAIN = {"epochs": 1, "batch_size": 4, "lr": 0.01}
PROTECT = {"energy": 0.9}
PICTURES: dict[str, dict[str, Any]] = {
    "finetune": {},
    "protect": {"protect": PROTECT},
    "average": {"average": {"weight": "curvature", "base": 0.9}},
    "ridge": {"method": "first_session", "head": "ridge"},
    "safe": {"method": "safe", "head": "ridge"},
    "olora": {"method": "olora"},
    "treelora": {"method": "treelora"},
    "l2p": {"pet": "prompt", "method": {"name": "pool", "members": 4, "select": {"name": "keys", "top": 2}}},
    "dualprompt": {"method": {"name": "pool", "members": "task", "select": "keys"}},
}
TEXTS: dict[str, dict[str, Any]] = {
    "language model": {"head": "lm"},
    "language model, treelora": {"head": "lm", "method": "treelora"},
}


class Steps(Silent):
    """Lets CUDA report waits in steps 3 to 5 of each phase."""

    def phase(self, phase: str, steps: int, epochs: int, done: int) -> None:
        torch.cuda.set_sync_debug_mode("default")

    def step(self, done: int, epoch: int, loss: float | None, images: int) -> None:
        torch.cuda.set_sync_debug_mode("warn" if 2 <= done < 5 else "default")


def reported(method: Method, tasks: list[Task]) -> dict[str, int]:
    """The lines at which CUDA waited in steps 3 to 5."""
    method.to("cuda")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for task in tasks:
            task.runtime.device, task.runtime.progress = torch.device("cuda"), Steps()
            learn_protected(method, task, batch_size=4)
    torch.cuda.set_sync_debug_mode("default")
    found = [w for w in caught if "synchroniz" in str(w.message)]
    return dict(Counter(f"{w.filename}:{w.lineno}" for w in found))


def main(wanted: list[str]) -> None:
    cuda, paths = torch.cuda.is_available(), {}
    for kind, group in ((TinyPictures(), PICTURES), (TinyTexts(), TEXTS)):
        for name, changes in group.items():
            if wanted and name not in wanted:
                continue
            base = {"name": "waits", "pet": {"name": "lora", "rank": 2, "at": ["q", "v"]}, "train": TRAIN, "data": None}
            method = build_method(make_recipe({**base, **changes}), kind.backbone())
            tasks = kind.stream(Runtime())[:2]
            if cuda:
                paths[name] = {"steps": reported(method, tasks)}
                continue
            waits = survey(method, tasks)
            once = waits.count(lambda wait: isinstance(wait.at, At) and not wait.at.in_step)
            paths[name] = {"steps": in_steps(waits), "passes": in_batches(waits), "beside steps": sum(once.values())}
    counted = "torch.cuda.set_sync_debug_mode" if cuda else "perpetune.check.waits"
    print(json.dumps({"torch": torch.__version__, "counted by": counted, "paths": paths}, indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
