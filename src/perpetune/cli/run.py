"""The verb that learns whole streams: run, of one recipe or of several, with one seed or several."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from perpetune.cli.common import finish, watched
from perpetune.cli.lines import LineRuns, Lines, lines
from perpetune.cli.options import Device, JsonLines, Quiet, Set
from perpetune.cli.output import steady
from perpetune.errors import Interrupted, UsageError

if TYPE_CHECKING:
    from perpetune.recipe import Recipe

DEMO = ("turned", "turned-control", "turned-taps", "turned-first", "turned-joint")
"""The recipes of `perpetune run` without an argument: plain fine-tuning; no training, with features of one block; no
training, with features of all blocks; training on the first task only; training on all data at once."""
DEMO_SEEDS = "2"


@steady
def run(
    recipes: Annotated[
        list[str] | None, typer.Argument(metavar="RECIPE", help="Packaged recipes by name, or YAML files.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The state folder to make, or the folder of several runs; default runs/NAME.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="A seed to use instead of the recipe's seed.")] = None,
    seeds: Annotated[
        str | None, typer.Option(metavar="N|A,B,…", help="Run each recipe with the seeds 0 to N-1, or A, B, …")
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="How many runs learn at the same time.")] = None,
    oracle: Annotated[
        bool,
        typer.Option(
            "--oracle",
            help="Also report the accuracy of a head that is fitted to the data of all tasks so far. It shows how good "
            "the features are. After each task this costs one pass over the training data of all tasks so far; "
            "--set evaluate.oracle=last does it after the last task only.",
        ),
    ] = False,
    device: Device = None,
    change: Set = None,
    quiet: Quiet = False,
    json: JsonLines = False,
) -> None:
    """Learn a whole stream of tasks, evaluate after each, and write the report. Without an argument: run the demo.

    With several recipes or seeds, each run gets a state folder in OUT, and OUT/comparison.html compares them. After an
    interruption, the same command continues the runs.

    Example: perpetune run turned --seeds 3 --jobs 2
    """
    from perpetune.recipe import load_recipe

    written = lines(json)
    changes = list(change or [])
    changes += [f"seed={seed}"] if seed is not None else []
    changes += [f"run.device={device}"] if device is not None else []
    changes += ["evaluate.oracle=true"] if oracle else []
    if not recipes:
        seeds = DEMO_SEEDS if seeds is None and seed is None else seeds
        jobs = jobs or min(4, os.cpu_count() or 1)
    loaded = [load_recipe(recipe, changes) for recipe in recipes or DEMO]
    if len(loaded) > 1 or seeds is not None:
        if seed is not None and seeds is not None:
            raise UsageError("--seed and --seeds: choose one of them")
        _run_several(loaded, _seeds(seeds), out, jobs or 1, device, quiet, written)
        return
    from perpetune.learner import Learner

    folder = out or _free(Path("runs") / loaded[0].name)
    with watched(quiet, folder, written) as view:
        learner = Learner(loaded[0], folder, progress=view)
        results = learner.run()
    finish(learner, results, written)


def _run_several(
    recipes: Sequence[Recipe],
    seeds: Sequence[int] | None,
    out: Path | None,
    at_once: int,
    device: str | None,
    quiet: bool,
    written: Lines | None,
) -> None:
    from perpetune.cli.jobs import finished, plan, run_all
    from perpetune.cli.live import RunLines, show_comparison, show_headroom
    from perpetune.report import compare, write_comparison

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("several processes together can learn only one run: start the runs one by one, or use --jobs")
    if at_once > 1:  # otherwise each run would use all cores
        recipes = [
            r.model_copy(update={"run": r.run.model_copy(update={"threads": r.run.threads or 1})}) for r in recipes
        ]
    folder = out or _shared(Path("runs") / recipes[0].name)
    if (folder / "recipe.yaml").exists():
        raise UsageError(f"{folder} is the state folder of one run: choose another --out for several runs")
    planned = plan(recipes, seeds, folder, device)
    results = {job.name: done for job in planned if (done := finished(job)) is not None}
    open_ = [job for job in planned if job.name not in results]
    view: RunLines | LineRuns
    if written is None or quiet:
        view = RunLines(quiet, [job.name for job in planned], len(results))
    else:
        view = LineRuns(written, [(job, results[job.name]) for job in planned if job.name in results])
    try:
        run_all(open_, at_once, view.tell)
    except Interrupted as stop:
        count = sum(finished(job) is not None for job in planned)
        message = f"{stop} with {count} of {len(planned)} runs complete; the same command continues the others"
        raise Interrupted(message, stop.signum) from None
    results |= {job.name: done for job in open_ if (done := finished(job)) is not None}
    named = [(str(job.folder), results[job.name]) for job in planned if job.name in results]
    failed = [job for job in planned if job.failure is not None]
    table = None
    if named:
        page = write_comparison(named, folder, "comparison")[0]
        table = compare([document for _, document in named], [name for name, _ in named])
        if written is None:
            show_comparison(table)
            print(f"comparison: {page}")
            show_headroom(table["headroom"])
    if written is not None:
        written.emit("done", comparison=table, failed=[job.name for job in failed])
    for job in failed:
        print(f"perpetune: {job.folder}: {job.failure}", file=sys.stderr)
    if failed:
        raise typer.Exit(1)


def _seeds(text: str | None) -> list[int] | None:
    """The seeds that `text` means: `3` means 0, 1 and 2; `0,3,5` means these three."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() for part in parts) or text.strip() == "0":
        raise UsageError(f"--seeds {text!r}: expected a number of seeds, such as 3, or a list, such as 0,3,5")
    named = [int(part) for part in parts]
    if "," not in text:
        return list(range(named[0]))
    if len(set(named)) < len(named):
        raise UsageError(f"--seeds {text!r}: the list has a seed twice")
    return named


def _shared(folder: Path) -> Path:
    """`folder`, or the first of `folder-2`, `folder-3`, … that is not the state folder of one run."""
    number, path = 1, folder
    while (path / "recipe.yaml").exists():
        number += 1
        path = folder.with_name(f"{folder.name}-{number}")
    return path


def _free(folder: Path) -> Path:
    """`folder`, or the first of `folder-2`, `folder-3`, … that does not exist."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("several processes must share one state folder: give it with --out")
    number, path = 1, folder
    while path.exists():
        number += 1
        path = folder.with_name(f"{folder.name}-{number}")
    return path


VERBS = (run,)
