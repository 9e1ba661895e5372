"""How near `perpetune estimate` comes: estimates of four recipes, and then the runs, each in a process of its own.

    python benchmarks/estimate.py [--out FILE.json] [--only NAME] [--small]

The packaged model on scikit-learn's digits, on the CPU. Times are seconds of the CPU of the whole process, for other
programs slow the clock on the wall. Memory is the peak of the process, bytes are those of the state folder after it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LORA = {"name": "lora", "at": ["q", "v"], "blocks": [3, 4, 5], "rank": 8, "alpha": 16}
CASES: dict[str, dict[str, Any]] = {
    "frozen, ridge": {"method": "frozen", "pet": None, "head": "ridge"},
    "finetune, linear": {"method": "finetune", "pet": LORA, "head": "linear"},
    "finetune, protected, ridge": {"method": "finetune", "pet": LORA, "head": "ridge", "protect": {}},
    "safe": {"method": "safe", "pet": LORA, "head": {"name": "ridge", "projection": 1000}},
}
"""What differs between the recipes. The other fields are the demo's, with all of the digits."""


def recipe_of(case: dict[str, Any], *, small: bool = False) -> dict[str, Any]:
    """A recipe of the demo's shape: five tasks of two digits."""
    return {
        "name": "estimated",
        "backbone": "perpetune:micro",
        "train": {"epochs": 2 if small else 3, "batch_size": 16 if small else 32, "lr": 1e-3, "head_lr": 1e-2},
        "data": "digits",
        "stream": {"classes_per_task": 2, "class_order": "sorted", **({"train_per_class": 60} if small else {})},
        "run": {"device": "cpu", "threads": 1},
        **case,
    }


PROGRAM = """
import json, resource, sys, time
from perpetune.cli import call
code = call(json.loads(sys.argv[1]))
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps([code, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024]), file=sys.stderr)
"""


def measured(arguments: list[str]) -> tuple[str, float, int]:
    """What a verb prints, its seconds of the CPU, and its peak memory in bytes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(arguments)], capture_output=True, text=True, env=environment
    )
    code, seconds, peak = json.loads(done.stderr.strip().splitlines()[-1])
    if code:
        raise SystemExit(f"{arguments}: {done.stderr}")
    return done.stdout, seconds, peak


def compare(case: dict[str, Any], place: Path, *, small: bool = False) -> dict[str, Any]:
    """The estimate of a recipe and what its run took: time, memory and bytes, each with their ratio."""
    file, folder = place / "recipe.yaml", place / "state"
    file.write_text(json.dumps(recipe_of(case, small=small)))  # JSON is YAML
    before = sorted(place.iterdir())
    out, took, _ = measured(["estimate", str(file), "--json"])
    if sorted(place.iterdir()) != before:
        raise SystemExit("the estimate has written something")
    told = json.loads(out.strip().splitlines()[-1])["estimate"]
    _, seconds, peak = measured(["run", str(file), "--out", str(folder)])
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    truth = {"cpu_seconds": seconds, "memory": peak, "bytes": size}
    found = {
        key: {"told": told[key]["value"], "took": value, "ratio": told[key]["value"] / value}
        for key, value in truth.items()
    }
    return {**found, "estimate_cpu_seconds": took, "share": took / seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only")
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    table = {}
    for name, case in CASES.items():
        if given.only and given.only != name:
            continue
        with tempfile.TemporaryDirectory() as place:
            table[name] = found = compare(case, Path(place), small=given.small)
        words = [
            f"{key} {found[key]['ratio']:.2f} ({found[key]['told']:.4g} / {found[key]['took']:.4g})"
            for key in ("cpu_seconds", "memory", "bytes")
        ]
        cost = f"{found['estimate_cpu_seconds']:.1f} s of the CPU, {found['share']:.0%} of the run"
        print(f"{name}: {', '.join(words)}; the estimate took {cost}", flush=True)
        if given.out:
            given.out.write_text(json.dumps(table, indent=2))


if __name__ == "__main__":
    main()
