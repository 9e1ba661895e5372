"""Verbs that learn: run, init, update, resume, rollback."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from perpetune.errors import UsageError

Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a recipe key, such as train.epochs=3.")
]
Device = Annotated[str | None, typer.Option(help="Where to run: auto, cpu, cuda, cuda:1, mps.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show nothing while it runs.")]
Json = Annotated[bool, typer.Option("--json", help="Print figures as JSON.")]
StateFolder = Annotated[Path, typer.Argument(metavar="STATE", help="A state folder.")]


def run(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A packaged recipe's name, or a YAML file.")] = "demo",
    out: Annotated[Path | None, typer.Option(help="The state folder to make; runs/NAME by default.")] = None,
    seed: Annotated[int | None, typer.Option(help="Instead of the recipe's.")] = None,
    device: Device = None,
    change: Set = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Learn a whole stream of tasks, evaluate after each, write the report. No argument: the packaged demo."""
    from perpetune.learner import Learner
    from perpetune.recipe import load_recipe

    changes = list(change or [])
    changes += [f"seed={seed}"] if seed is not None else []
    changes += [f"run.device={device}"] if device is not None else []
    loaded = load_recipe(recipe, changes)
    folder = out or _free(Path("runs") / loaded.name)
    with _watch(quiet or json) as view:
        learner = Learner(loaded, folder, progress=view)
        results = learner.run()
    _finish(learner, results, json)


def init(
    state: StateFolder,
    model: Annotated[
        str | None, typer.Option(help="timm:NAME, hf:ID_OR_FOLDER, folder:PATH or perpetune:micro.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="First batch of data: a folder, manifest, parquet file or id.")
    ] = None,
    recipe: Annotated[str, typer.Option(help="Recipe to start from; its data are not used.")] = "update",
    name: Annotated[str | None, typer.Option(help="Name of the first task.")] = None,
    device: Device = None,
    change: Set = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Make a state folder that `update` feeds, one batch of data after the other."""
    from perpetune.learner import Learner
    from perpetune.recipe import load_recipe

    changes = [*(change or []), "data=null"]
    changes += [f"backbone.name={model}"] if model else []
    changes += [f"run.device={device}"] if device is not None else []
    with _watch(quiet or json) as view:
        learner = Learner(load_recipe(recipe, changes), state, progress=view)
        results = learner.learn(data, name=name) if data else None
    if results:
        _finish(learner, results, json)
    elif not json:
        print(f"{state} is ready: feed it with `perpetune update {state} --data FOLDER`")


def update(
    state: StateFolder,
    data: Annotated[str, typer.Option(help="A folder, manifest, parquet file or dataset id.")],
    name: Annotated[str | None, typer.Option(help="Name of the task; by default that of the folder or file.")] = None,
    holdout: Annotated[
        float, typer.Option(min=0.0, max=0.9, help="Share kept for testing if there is no test split.")
    ] = 0.2,
    device: Device = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Learn one more batch of data: new classes, new images of known ones, or both."""
    from perpetune.learner import Learner

    with _watch(quiet or json) as view:
        learner = Learner.load(state, device=device, progress=view)
        results = learner.learn(data, name=name, holdout=holdout)
    _finish(learner, results, json)


def resume(state: StateFolder, device: Device = None, quiet: Quiet = False, json: Json = False) -> None:
    """Go on where an interrupted run or update stopped."""
    from perpetune.learner import Learner

    with _watch(quiet or json) as view:
        learner = Learner.load(state, device=device, progress=view)
        before = len(learner.state.committed)
        results = learner.resume()
    if learner.runtime.rank == 0 and len(results["tasks"]) == before and not json:
        print(f"nothing to resume: {before or 'no'} task{'s' if before != 1 else ''} learned, and none is open")
    if before or results["tasks"] or json:
        _finish(learner, results, json)


def rollback(
    state: StateFolder,
    to: Annotated[
        str,
        typer.Option(metavar="TASK", help="Last task to keep: its name or folder (0003-NAME), or `start` to drop all."),
    ],
    json: Json = False,
) -> None:
    """Drop the tasks after one, as if they had never been learned."""
    from perpetune.cli.common import print_json
    from perpetune.report import write_report
    from perpetune.results import read_results
    from perpetune.state import State

    opened = State(state)
    with opened.writing():
        dropped = opened.rollback(to)
        if dropped and (state / "report.html").is_file():  # it tells of tasks that are gone
            write_report(read_results(opened), state)
    kept = [t.name for t in opened.committed]
    if json:
        print_json({"dropped": dropped, "kept": kept})
    else:
        told = f"dropped {', '.join(dropped)}" if dropped else "nothing to drop"
        print(f"{told}; {state} has {', '.join(kept) or 'nothing learned'}")


def _free(folder: Path) -> Path:
    """`folder`, or the first of `folder-2`, `folder-3`, … that is not there."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("several processes need one state folder: name it with --out")
    number, path = 1, folder
    while path.exists():
        number += 1
        path = folder.with_name(f"{folder.name}-{number}")
    return path


def _watch(quiet: bool) -> Any:
    from perpetune.cli.live import watch

    return watch(quiet)


def _finish(learner: Any, results: dict[str, Any], json: bool) -> None:
    """Print the figures and write the report; one process of several does."""
    from perpetune.cli.common import print_json
    from perpetune.report import write_report

    if learner.runtime.rank != 0:
        return
    folder: Path = learner.state.folder
    write_report(results, folder)
    if json:
        print_json(results)
    else:
        from perpetune.cli.live import show_results

        show_results(results)
        print(f"report: {folder / 'report.html'}")


VERBS = (run, init, update, resume, rollback)
