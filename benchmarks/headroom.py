"""What a recipe wins of what there is to win: from doing nothing to one training on all data.

    python benchmarks/headroom.py demo demo-pegp-ridge --seeds 3 --jobs 2
    python benchmarks/headroom.py benchmarks/recipes/cifar100-dino56.yaml --out runs/headroom
    python benchmarks/headroom.py demo --taps 3 --set train.epochs=1 --set stream.train_per_class=20    # smaller

For each recipe: the control (frozen, ridge on the model's own feature), frozen taps (frozen, ridge on several blocks),
the recipe itself with its oracle head, and joint with three heads: linear, ridge, and ridge on taps. Runs that are the
same for several recipes are made once. OUT holds a state folder for each run and the comparison; the same command goes
on with what was interrupted, and skips what is complete. Prints the table, then JSON; with --json the JSON alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perpetune.cli.jobs import finished, plan, run_all
from perpetune.cli.live import RunLines, show_comparison, show_headroom
from perpetune.errors import Interrupted, PerpetuneError
from perpetune.recipe import Recipe, load_recipe
from perpetune.report import compare, write_comparison
from perpetune.report.sections.headroom import changes

# What trains nothing is the same for all recipes of one stream: the head's own defaults, and no settings of training.
SAME = ("head=ridge", "head.projection=0", "train={}", "online=false")


def variants(name: str, given: Sequence[str], taps: str | None) -> list[Recipe]:
    """The runs of one recipe, as `given` changes it; without `taps` those that read them are left out."""
    base = load_recipe(name, given)
    content = base.model_dump(mode="json")

    def made(ending: str, made_by: Sequence[str]) -> Recipe:
        return load_recipe(name, [*given, *made_by, f"name={base.name}-{ending}"])

    found = [made("control", [*changes("control", content, None), *SAME])]
    found += [made("taps", [*changes("frozen taps", content, taps), *SAME])] if taps else []
    found += [load_recipe(name, [*given, "evaluate.oracle=true"])]
    joint = changes("joint", content, None)
    own = [f"backbone.{key}=null" for key in ("tokens", "taps") if content["backbone"].get(key) is not None]
    found += [made(f"joint-{head}", [*joint, *own, f"head={head}"]) for head in ("linear", "ridge")]
    found += [made("joint-taps", changes("joint", content, taps))] if taps else []
    return found


def distinct(recipes: Sequence[Recipe]) -> list[Recipe]:
    """Those that differ in what they learn; of two that do not, the one with an oracle head, which tells more."""
    found: dict[str, Recipe] = {}
    for recipe in recipes:
        learns = recipe.model_dump_json(exclude={"name", "description", "evaluate", "run"}) + recipe.run.precision
        if learns not in found or recipe.evaluate.oracle:
            found[learns] = recipe
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("recipes", nargs="+", metavar="RECIPE", help="packaged recipes by name, or YAML files")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0")
    parser.add_argument("--jobs", type=int, default=1, help="how many runs go on at a time")
    parser.add_argument("--taps", default="auto", help="blocks that taps read; 0 leaves them out")
    parser.add_argument("--out", type=Path, default=Path("runs/headroom"))
    parser.add_argument("--set", action="append", default=[], dest="change", metavar="KEY=VALUE", help="of all recipes")
    parser.add_argument("--json", action="store_true", help="print the JSON alone")
    given = parser.parse_args()
    try:
        failures = bench(given)
    except Interrupted as stop:
        sys.exit(f"{stop}; the same command goes on")
    except PerpetuneError as error:
        sys.exit(str(error))
    sys.exit("\n".join(failures) or 0)


def bench(given: argparse.Namespace) -> list[str]:
    """Runs and prints all; returns a line for each run that failed."""
    change = [*given.change, *(["run.threads=1"] if given.jobs > 1 else [])]
    taps = None if given.taps == "0" else given.taps
    recipes = distinct([r for name in given.recipes for r in variants(name, change, taps)])
    jobs = plan(recipes, range(given.seeds), given.out, None)
    results = {job.name: done for job in jobs if (done := finished(job)) is not None}
    open_ = [job for job in jobs if job.name not in results]
    run_all(open_, given.jobs, RunLines(given.json, [job.name for job in jobs], len(results)).tell)
    results |= {job.name: done for job in open_ if (done := finished(job)) is not None}
    named = [(str(job.folder), results[job.name]) for job in jobs if job.name in results]
    if named:
        write_comparison(named, given.out, "comparison")
        compared = compare([run for _, run in named], [name for name, _ in named])
        if not given.json:
            show_comparison(compared)
            show_headroom(compared["headroom"])
        about = {key: value for key, value in vars(given).items() if key not in ("json", "out", "change")}
        seconds = {name: sum(t["learn_s"] + t["evaluate_s"] for t in run["timings"]) for name, run in results.items()}
        oracle = {
            name: found
            for name, run in results.items()
            if (found := sum(t.get("oracle_s", 0.0) for t in run["timings"])) > 0
        }
        out: dict[str, Any] = {
            **about,
            "set": given.change,
            "out": str(given.out),
            "headroom": compared["headroom"],
            "seconds": seconds,
            "oracle_seconds": oracle,
        }
        print(json.dumps(out, indent=2))
    return [f"{job.folder}: {job.failure}" for job in jobs if job.failure is not None]


if __name__ == "__main__":
    main()
