"""What `test_distributed.py` runs in each of several processes: `pair.py FOLDER`, with recipes in FOLDER/recipes.json.

Each process writes what it saw to FOLDER/seen-RANK.json.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

from test_evaluate import SAID, Says, task_of

from perpetune.errors import Interrupted, UsageError
from perpetune.evaluate import evaluate
from perpetune.learner import Learner
from perpetune.runtime import Runtime, Silent
from perpetune.snapshot import snapshot
from perpetune.tasks import part


class StopAt(Silent):
    """Sends this process a SIGTERM at a step, as somebody outside would."""

    def __init__(self, step: int):
        self.at = step

    def step(self, done: int, epoch: int, loss: float | None, images: int) -> None:
        if done == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


class Counts(Silent):
    """Counts the tasks it is told of."""

    tasks = 0

    def task(self, index: int, name: str, classes: int, examples: int) -> None:
        self.tasks += 1


def stopped(content: dict[str, Any], folder: Path, rank: int) -> dict[str, Any]:
    """The second process alone is asked to stop; both do, and both go on."""
    learner = Learner(content, folder)
    if rank == 1:
        learner.runtime.progress = StopAt(3)
    try:
        learner.run()
    except Interrupted as stop:
        kept = sorted(p.name for p in (folder / "resume").iterdir())
        learner.runtime.accelerator.wait_for_everyone()  # else one goes on while the other still looks
        results = Learner.load(folder).resume()
        return {"code": stop.exit_code, "kept": kept, "tasks": len(results["tasks"])}
    return {}


def main(folder: Path) -> None:
    fresh = Runtime()  # joins the others when it is asked who it is
    rank = fresh.rank
    seen: dict[str, Any] = {"world": fresh.world, "told": {}, "evaluated": {}, "learned": {}}
    recipes = json.loads((folder / "recipes.json").read_text())
    for name, content in recipes.items():
        if name == "stopped":
            seen[name] = stopped(content, folder / name, rank)
            continue
        counts = Counts()
        learner = Learner(content, folder / name, progress=counts)
        learner.run()
        seen["told"][name] = counts.tasks
        seen["evaluated"][name] = learner.evaluate()
        seen["learned"][name] = {
            file: sha256(content).hexdigest() for file, content in snapshot(learner.method).items()
        }
        seen["device"] = str(learner.runtime.device)
    seen["answers"] = [
        evaluate(Says("abcd"), task_of("ab", part(SAID, range(n))), among="seen", batch_size=2) for n in range(1, 6)
    ]
    try:
        Learner(next(iter(recipes.values())))
    except UsageError as error:
        seen["without a folder"] = str(error)
    (folder / f"seen-{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
