"""The verbs that change a state: init, update, resume, rollback, forget, prune, relocate."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from perpetune.cli.common import finish, print_json, watched
from perpetune.cli.lines import Lines, LineView, lines
from perpetune.cli.options import DataSet, Device, Json, JsonLines, Quiet, Set, StateFolder, options_of
from perpetune.cli.output import steady
from perpetune.errors import UsageError

if TYPE_CHECKING:
    from perpetune.errors import Refused


@steady
def init(
    state: StateFolder,
    model: Annotated[
        str | None,
        typer.Option(help="timm:NAME, hf:ID_OR_FOLDER, folder:PATH, perpetune:micro, or pair:{picture: …, text: …}."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="First batch of data: a folder, manifest, parquet file or id.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="The recipe to start from; its data section is not used. By default `update`, and `update-text` for a "
            "--model that reads pictures and texts, such as CLIP."
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the first task.")] = None,
    device: Device = None,
    change: Set = None,
    quiet: Quiet = False,
    json: JsonLines = False,
) -> None:
    """Make a state folder; `update` then adds one batch of data after the other.

    Example: perpetune init birds --model timm:vit_small_patch14_dinov2.lvd142m
    """
    from json import dumps

    from perpetune.learner import Learner
    from perpetune.recipe import load_recipe

    changes = [*(change or []), "data=null"]
    changes += [f"backbone.name={dumps(model)}"] if model else []  # in quotes: a pair has the look of a mapping
    changes += [f"run.device={device}"] if device is not None else []
    chosen = recipe or _recipe_for(model)
    out = lines(json)
    with watched(quiet, state, out) as view:
        learner = Learner(load_recipe(chosen, changes), state, progress=view)
        results = learner.learn(data, name=name) if data else None
    if results:
        finish(learner, results, out)
    elif out is not None:
        out.emit("done", results=None, report=None)
    else:
        print(f"{state} is ready: add data with `perpetune update {state} --data FOLDER`")


def _recipe_for(model: str | None) -> str:
    """The recipe that `init` starts from if nobody names one."""
    from perpetune.cli.notes import Notes
    from perpetune.models.loaders.kind import is_dual

    if model is None or not is_dual(model):
        return "update"
    Notes().note(f"{model} reads pictures and texts: its recipe is update-text; --recipe update is for pictures alone")
    return "update-text"


@steady
def update(
    state: StateFolder,
    data: Annotated[str, typer.Option(help="A folder, manifest, parquet file or dataset id.")],
    name: Annotated[
        str | None, typer.Option(help="Name of the task; by default the name of the folder or file.")
    ] = None,
    holdout: Annotated[
        float, typer.Option(min=0.0, max=0.9, help="Share of the data kept for testing if there is no test split.")
    ] = 0.2,
    max_drop: Annotated[
        float | None,
        typer.Option(
            "--max-drop",
            min=0.0,
            metavar="POINTS",
            help="Refuse the update (exit code 3, the state stays as it is) if an earlier task's held-out data, or an "
            "exam, falls by more points, and not by chance. By default the recipe's `gate`.",
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where the report of a refused update goes; default STATE-refused-NAME."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Learn nothing, and say what the data hold: classes, counts, copies, odd spellings."
        ),
    ] = False,
    changes: DataSet = None,
    device: Device = None,
    quiet: Quiet = False,
    json: JsonLines = False,
) -> None:
    """Learn one more batch of data: new images, new classes or new texts.

    Example: perpetune update birds --data 2026-11/ --max-drop 2
    """
    from perpetune.learner import Learner

    options = options_of(changes)
    if dry_run:
        if max_drop is not None or report is not None:
            raise UsageError(
                "--dry-run learns nothing, so there is nothing for --max-drop and --report: leave them out"
            )
        _show_month(state, data, name, holdout, options, device, lines(json))
        return
    out = lines(json)
    with watched(quiet, state, out) as view, _gated(state, report, out):
        learner = Learner.load(state, device=device, progress=view)
        results = learner.learn(data, name=name, holdout=holdout, options=options, max_drop=max_drop)
    finish(learner, results, out)


def _show_month(
    state: Path,
    data: str,
    name: str | None,
    holdout: float,
    options: dict[str, Any],
    device: str | None,
    out: Lines | None,
) -> None:
    from perpetune import month
    from perpetune.cli.notes import Notes
    from perpetune.learner import Learner

    learner = Learner.load(state, device=device, progress=LineView(out) if out is not None else Notes())
    found = learner.month(data, name=name, holdout=holdout, options=options)
    if out is not None:
        out.emit("done", month=found)
    else:
        print("\n".join(month.lines(found)))


@contextlib.contextmanager
def _gated(state: Path, folder: Path | None, out: Lines | None) -> Iterator[None]:
    """Where an update is refused, print what its gate has measured, and write the report of what was learned beside the
    state, which stays as it is."""
    from perpetune.errors import Refused

    try:
        yield
    except Refused as refused:
        if int(os.environ.get("RANK", "0")) == 0:
            _show_refused(refused, folder or _beside(state, refused), out)
        raise


def _beside(state: Path, refused: Refused) -> Path:
    place = state.absolute()
    return place.with_name(f"{place.name}-refused-{refused.candidate['tasks'][-1]['name']}")


def _show_refused(refused: Refused, folder: Path, out: Lines | None) -> None:
    from perpetune.report import write_report

    page: str | None = str(folder / "report.html")
    try:
        write_report(refused.candidate, folder)
        written = f"report: {page}"
    except OSError as error:  # the refusal is what has to be told
        page, written = (
            None,
            f"the report could not be written to {folder}: {error.strerror}; --report says where it goes",
        )
    if out is not None:
        if page is None:
            out.emit("note", message=written)
        out.emit("refused", gate=refused.gate, state=refused.now, candidate=refused.candidate, report=page)
    else:
        from perpetune.cli.live import show_results

        show_results(refused.candidate)
        print(written)


@steady
def resume(state: StateFolder, device: Device = None, quiet: Quiet = False, json: JsonLines = False) -> None:
    """Continue an interrupted run or update where it stopped.

    Example: perpetune resume birds
    """
    from perpetune.learner import Learner

    out = lines(json)
    with watched(quiet, state, out) as view, _gated(state, None, out):
        learner = Learner.load(state, device=device, progress=view)
        before = len(learner.state.committed)
        results = learner.resume()
    if learner.runtime.rank == 0 and len(results["tasks"]) == before and not json:
        print(f"nothing to resume: {before or 'no'} task{'s' if before != 1 else ''} learned, no task unfinished")
    if before or results["tasks"] or json:
        finish(learner, results, out)


@steady
def rollback(
    state: StateFolder,
    to: Annotated[
        str,
        typer.Option(
            metavar="TASK", help="Last task to keep: its name or folder (0003-NAME); `start` drops all tasks."
        ),
    ],
    json: Json = False,
) -> None:
    """Drop all tasks after a given task, as if they had never been learned.

    Example: perpetune rollback birds --to 2026-10
    """
    from perpetune.report import write_report
    from perpetune.results import read_results
    from perpetune.state import State, interrupted

    opened = State(state)
    with opened.writing():
        discarded = interrupted(state / "resume") if opened.open_task() else ""
        discarded = discarded or opened.discard_candidate()
        dropped = opened.rollback(to)
        if dropped and (state / "report.html").is_file():  # the old report describes the dropped tasks
            write_report(read_results(opened), state)
    kept = [t.name for t in opened.committed]
    if json:
        print_json({"dropped": dropped, "kept": kept, **({"discarded": discarded} if discarded else {})})
    else:
        message = f"dropped {', '.join(dropped)}" if dropped else "" if discarded else "nothing to drop"
        message += f"{'; ' if message else ''}discarded {discarded}" if discarded else ""
        print(f"{message}; {state} has {', '.join(kept) or 'no learned tasks'}")


@steady
def forget(
    state: StateFolder,
    task: Annotated[str | None, typer.Option(metavar="NAME", help="The task to forget.")] = None,
    name: Annotated[str | None, typer.Option("--class", metavar="NAME", help="The class to forget.")] = None,
    device: Device = None,
    quiet: Quiet = False,
    json: JsonLines = False,
) -> None:
    """Take a task or a class out again, exactly, as if it had never been learned; or refuse, and change nothing.

    A rollback to earlier tasks would bring it back, so after it only this state is kept.

    Example: perpetune forget birds --task 2026-10
    """
    from perpetune.learner import Learner

    if (task is None) == (name is None):
        raise UsageError("forget: give --task NAME or --class NAME, one of the two")
    out = lines(json)
    with watched(quiet, state, out) as view:
        learner = Learner.load(state, device=device, progress=view)
        results = learner.forget(task=task, class_name=name)
    finish(learner, results, out)
    if out is None:
        what = [*(f"task {one}" for one in results["forgot"][-1]["tasks"])]
        what += [f"class {one}" for one in results["forgot"][-1]["classes"]]
        print(f"forgotten: {', '.join(what)}; {state} can no longer be rolled back to earlier tasks")


def prune(
    state: StateFolder,
    keep: Annotated[int, typer.Option(metavar="N", help="How many of the newest tasks can still be rolled back to.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be dropped, and change nothing.")] = False,
    json: JsonLines = False,
) -> None:
    """Free the disk of what only a rollback to old tasks needs. Predictions, results and reports stay as they are.

    Example: perpetune prune birds --keep 12 --dry-run
    """
    from perpetune.report import form
    from perpetune.state import State

    out, opened = lines(json), State(state)
    with nullcontext() if dry_run else opened.writing():
        done = opened.prune(keep, dry_run=dry_run, by=f"perpetune prune --keep {keep}")
    if out is not None:
        out.emit("done", dropped=done.dropped, kept=done.kept, bytes=done.bytes, dry_run=dry_run)
    elif not done.dropped:
        print(f"nothing to drop; {state} can go back to {', '.join(done.kept) or 'no task'}")
    else:
        would, comes = ("would drop", "would come") if dry_run else ("dropped", "came")
        print(
            f"{would} what only a rollback to {', '.join(done.dropped)} needs; {form.size(done.bytes)} {comes} free; "
            f"{state} can go back to {', '.join(done.kept)}"
        )


def relocate(
    state: StateFolder,
    model: Annotated[str | None, typer.Option(help="Where the model is now: folder:PATH, hf:ID_OR_FOLDER, …")] = None,
    data: Annotated[
        str | None, typer.Option(metavar="OLD=NEW", help="A folder or file of tasks' data, and where it is now.")
    ] = None,
) -> None:
    """Tell a state that its model or its data lie elsewhere now. The fingerprint makes sure that they are the same.

    Example: perpetune relocate birds --model folder:/models/vit
    """
    from perpetune.learner import Learner

    old, equals, new = (data or "").partition("=")
    if data is not None and not (old and equals and new):
        raise UsageError(f"--data {data!r}: the old place and the new one are expected, as OLD=NEW")
    Learner.relocate(state, model=model, data=(old, new) if data is not None else None)
    places = [f"its model is {model}"] * (model is not None) + [f"data of {old} are in {new}"] * (data is not None)
    print(f"{state}: {', '.join(places)}")


VERBS = (init, update, resume, rollback, forget, prune, relocate)
