"""What a state with many tasks costs: bytes on the disk, and CPU time of a commit, of opening and of reading.

Three kinds of state, with tensors in the place of a method:

  same    one tensor that stays and one of each task's own, 4 kB
  bank    an adapter of 24 kB more with each task; all of them stay
  months  sums of SIZE × SIZE in float64 that change with each task, and an adapter that stays; `run.keep: auto`

    python benchmarks/store.py [--tasks 10,100,1000] [--months 300] [--size 500]

Each state grows from one number of tasks to the next, and each figure is the mean over five commits or readings. The
disk is not waited for. For `months`, what earlier tasks may always take (16 MB) is scaled with the sums as if they were
2,000 × 2,000. It prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

import perpetune.state.folder
from perpetune.recipe import make_recipe
from perpetune.state import State, prune

Tensors = dict[str, dict[str, torch.Tensor]]


def made(folder: Path) -> State:
    return State.create(folder, make_recipe({}), {"spec": "none", "fingerprint": "none"})


def commit(state: State, index: int, learned: Tensors) -> None:
    """What `run` writes around a task, without its metrics, whose size is that of what was evaluated."""
    name = f"m{index:04d}"
    files = {**{file: save(tensors) for file, tensors in learned.items()}, "extra.json": b"{}"}
    state.log("task begun", task=index, name=name, fingerprint="0" * 64, **{"from": {"name": "folder", "path": "/x"}})
    state.commit(index, name, files, {"task.json": {"index": index, "name": name}})  # type: ignore[arg-type]


def same(learned: Tensors, index: int) -> None:
    file = learned.setdefault("pet.safetensors", {"stays": torch.randn(1000)})
    file["own"] = torch.randn(1000)


def bank(learned: Tensors, index: int) -> None:
    learned.setdefault("pet.safetensors", {})[f"adapter.{index}"] = torch.randn(8, 768)


def cpu_ms(act: Callable[[], Any], times: int = 5) -> float:
    before = time.process_time()
    for _ in range(times):
        act()
    return round(1000 * (time.process_time() - before) / times, 2)


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def times_of(grow: Callable[[Tensors, int], None], counts: list[int]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as root:
        state, learned, index = made(Path(root) / "state"), dict[str, Any](), 0

        def another() -> None:
            nonlocal index
            grow(learned, index)
            commit(state, index, learned)
            index += 1

        for count in counts:
            while index < count:
                another()
            commit_ms = cpu_ms(another)
            opened = State(state.folder)
            rows.append(
                {
                    "tasks": count,
                    "commit_ms": commit_ms,
                    "open_ms": cpu_ms(lambda: State(state.folder).committed),
                    "list_again_ms": cpu_ms(lambda opened=opened: opened.committed),
                    "read_newest_ms": cpu_ms(lambda opened=opened: opened.committed[-1].read()),
                    "bytes": bytes_of(state.folder),
                    "newest_alone_bytes": state.committed[-1].needs(),
                    "whole_copies_bytes": sum(sum(task.sizes().values()) for task in state.committed),
                }
            )
    return rows


def months(count: int, size: int) -> dict[str, Any]:
    prune.FLOOR = 16 * 10**6 * size**2 // 2000**2
    adapter = 150
    with tempfile.TemporaryDirectory() as root:
        state, learned, first = made(Path(root) / "state"), dict[str, Any]({"earlier.safetensors": {}}), 0
        for index in range(count):
            learned["earlier.safetensors"][f"adapter.{index}"] = torch.randn(adapter)
            learned["statistics.safetensors"] = {"gram": torch.randn(size, size, dtype=torch.float64)}
            commit(state, index, learned)
            first = first or bytes_of(state.folder)
        total = bytes_of(state.folder)
        kept = sum(not task.pruned for task in state.committed)
        whole = sum(sum(task.sizes().values()) for task in state.committed)
    ratio = round((total - 4 * adapter * count) / first, 2)
    found = {"months": count, "bytes_after_one": first, "bytes": total, "without_adapters_to_one": ratio}
    return {**found, "tasks_to_go_back_to": kept, "whole_copies_bytes": whole}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="10,100,1000")
    parser.add_argument("--months", type=int, default=300)
    parser.add_argument("--size", type=int, default=500)
    args = parser.parse_args()
    torch.set_num_threads(1)
    perpetune.state.folder.snapshot = dict  # type: ignore[assignment]  # a method is its files here
    os.fsync = lambda descriptor: None  # type: ignore[assignment]
    counts = [int(n) for n in args.tasks.split(",")]
    found = {"same": times_of(same, counts), "bank": times_of(bank, [n for n in counts if n <= 300])}
    print(json.dumps({**found, "months": months(args.months, args.size)}, indent=2))


if __name__ == "__main__":
    main()
