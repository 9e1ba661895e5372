"""The verb that says what another one will cost: estimate."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any

import typer

from perpetune.cli.lines import lines
from perpetune.cli.options import Device, JsonLines

if TYPE_CHECKING:
    from rich.console import Console


def estimate(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE|STATE", help="A packaged recipe's name, a YAML file, or a state folder.")
    ],
    data: Annotated[
        str | None, typer.Option(help="The data of an update: a folder, manifest, parquet file or dataset id.")
    ] = None,
    holdout: Annotated[
        float, typer.Option(min=0.0, max=0.9, help="As in `update`: share of the data kept for testing.")
    ] = 0.2,
    change: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change a recipe key, such as train.epochs=3; with STATE a key of the data section, as in `update`.",
        ),
    ] = None,
    device: Device = None,
    json: JsonLines = False,
) -> None:
    """Say what `run RECIPE` will take before you start it: time, memory and bytes on the disk.

    With --data it is `update STATE --data DATA`, or the first update of a new state of RECIPE. Some examples of the
    first tasks are learned in a temporary folder and measured. Nothing else is written.

    Example: perpetune estimate demo --set train.epochs=10, or perpetune estimate birds --data photos/june
    """
    began, out = time.perf_counter(), lines(json)
    from rich.console import Console

    from perpetune.forecast.estimating import estimate as measure
    from perpetune.forecast.estimating import is_state
    from perpetune.recipe import Recipe, apply_change, load_recipe

    options: dict[str, Any] = {}
    subject: Recipe | str = recipe
    if is_state(recipe):
        for one in change or ():
            apply_change(options, one)
    elif change:
        subject = load_recipe(recipe, change)
    console = Console(highlight=False)
    with console.status("learns a few examples to measure them") if console.is_terminal and not json else nullcontext():
        spent = time.perf_counter() - began, time.process_time()  # a run imports the same
        found = measure(subject, data, holdout=holdout, options=options or None, device=device, spent=spent)
    if out is not None:
        out.emit("done", estimate=found)
    else:
        _show(console, found)


def _show(console: Console, found: dict[str, Any]) -> None:
    """Print an estimate: a row for each task, then time, memory and bytes with their ranges, and what was guessed."""
    from perpetune.report import form
    from perpetune.report.terminal import new_table

    table = new_table()
    headings = ("train", "test", "steps", "prepare", "learn", "evaluate", "store", "time", "disk")
    table.add_column("task")
    for heading in headings:
        table.add_column(heading, justify="right")
    for task in _rows(found["tasks"]):
        if task is None:
            table.add_row("…", *[""] * len(headings))
            continue
        asked = sum(task[f"{part}_s"] for part in ("new", "earlier", "drift", "oracle", "rest"))
        stored = task["commit_s"] + task["report_s"] + task["other_s"]
        times = (task["prepare_s"], task["learn_s"], asked, stored, task["seconds"])
        table.add_row(
            f"{task['index'] + 1} {task['name']}",
            *(form.count(task[key]) for key in ("train", "test", "steps")),
            *map(form.duration, times),
            form.size(task["bytes"]),
        )
    console.print(table)
    whole = found["bytes"]
    rows: list[tuple[str, Any, Any]] = [
        ("time", found["seconds"], form.duration),
        ("of the CPU", found["cpu_seconds"], form.duration),
    ]
    rows += [("memory", found["memory"], form.size), ("disk", whole, form.size)]
    of = {"memory": f"the peak of {(found['memory'] or {}).get('of', '')}", "disk": "the state folder in the end"}
    of["time"] = f"on {found['device']}, {form.duration(found['start_s'])} of it until the first task"
    for name, value, text in rows:
        if value is not None:
            about = f"{text(value['low'])} to {text(value['high'])}" + (f"; {of[name]}" if name in of else "")
            print(f"{name:<10}  {text(value['value'])}  ({about})")
    for guess in found["guesses"]:
        print(f"guess: {guess}")


MOST = 24  # rows of tasks on a terminal


def _rows(tasks: list[dict[str, Any]]) -> list[dict[str, Any] | None]:
    """The tasks that are shown; None stands for those between."""
    return [*tasks] if len(tasks) <= MOST else [*tasks[: MOST - 2], None, tasks[-1]]


VERBS = (estimate,)
