"""Verbs that use what was learned: predict, evaluate, export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from perpetune.cli.learn import Device, Json, StateFolder

if TYPE_CHECKING:
    from perpetune.learner import Answer, Learner


def predict(
    state: StateFolder,
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="Image files or folders of them. For a language model: prompts, .txt files with one on each line, or "
            ".jsonl files with `prompt` or `messages`; - reads lines from standard input.",
        ),
    ],
    top: Annotated[int, typer.Option(min=1, help="Names to print for each image or text.")] = 3,
    options: Annotated[
        str | None,
        typer.Option(help="Answers a language model chooses among, with commas; of a head of classes some of those."),
    ] = None,
    device: Device = None,
    json: Json = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV: image, then name and probability by rank.")] = False,
) -> None:
    """Print names and probabilities for images, or a language model's answers."""
    from perpetune.errors import UsageError
    from perpetune.learner import Learner

    if json and csv:
        raise UsageError("--json and --csv: choose one of them")
    learner = Learner.load(state, device=device)
    show = {"predict": _predictions, "answer": _answers}[learner.method.model.view.verb]
    show(learner, inputs, top, options, json, csv)


def _predictions(learner: Learner, inputs: list[str], top: int, options: str | None, json: bool, csv: bool) -> None:
    import csv as csv_writer
    import sys

    from perpetune.cli.common import print_json
    from perpetune.data.names import several
    from perpetune.errors import DataError, UsageError

    if options is not None:
        raise UsageError("--options is for language models: an image classifier knows its classes")
    files = learner.method.model.view.typed(inputs)
    unreadable: list[str] = []
    found = learner.predict(files, top=top, unreadable=unreadable)
    if json:
        print_json(
            [{"image": p.image, "classes": [{"name": n, "probability": v} for n, v in p.classes]} for p in found]
        )
    elif csv:
        writer = csv_writer.writer(sys.stdout)
        ranks = range(1, max((len(p.classes) for p in found), default=0) + 1)
        writer.writerow(["image", *(f"{what}_{rank}" for rank in ranks for what in ("name", "probability"))])
        writer.writerows([p.image, *(x for name, v in p.classes for x in (name, f"{v:.6f}"))] for p in found)
    else:
        for p in found:
            print(f"{p.image}: {', '.join(f'{name} {value:.3f}' for name, value in p.classes)}")
    if unreadable:
        raise DataError(f"{len(unreadable)} of {len(files)} pictures cannot be read: {several(unreadable)}")


def _answers(learner: Learner, inputs: list[str], top: int, options: str | None, json: bool, csv: bool) -> None:
    import dataclasses
    import sys

    from perpetune.cli.common import print_json
    from perpetune.errors import UsageError

    if csv:
        raise UsageError("--csv is for images: use --json for answers")
    view = learner.method.model.view
    found = learner.answer(view.typed(inputs), options=None if options is None else options.split(","))
    if learner.method.model.chooses:  # among all classes; with the output layer, among the options of this call
        found = [dataclasses.replace(a, options=a.options[:top]) for a in found]
    cut = [a.cut for a in found if a.cut]
    if cut:
        print(f"perpetune: {view.cut_note(cut, len(found), 'prompts')}", file=sys.stderr)
    if json:
        print_json([_shown(a) for a in found])
        return
    for a in found:
        shares = f"  ({', '.join(f'{name} {value:.3f}' for name, value in a.options)})" if a.options else ""
        print(f"{a.text}{shares}")


def _shown(answer: Answer) -> dict[str, Any]:
    """An answer as plain values; what does not apply to it is left out."""
    asked: Any = answer.prompt
    if not isinstance(asked, str):
        asked = [{"role": role, "content": content} for role, content in asked]
    more = {"options": dict(answer.options), "cut": answer.cut}
    return {"prompt": asked, "answer": answer.text, **{key: value for key, value in more.items() if value}}


def evaluate(
    state: StateFolder,
    data: Annotated[str | None, typer.Option(help="Labelled data; by default the test data of every task.")] = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Print the accuracy on test data."""
    from perpetune.cli.common import print_json
    from perpetune.learner import Learner
    from perpetune.report import form

    cells = Learner.load(state, device=device).evaluate(data)
    if json:
        print_json(cells)
        return
    rows = list(cells.items())
    known = [c for c in cells.values() if c is not None]
    if len(known) > 1:
        scores = {c.get("score") for c in known}  # of several, the sum is of no one score
        totals = {key: sum(c[key] for c in known) for key in ("correct", "total")}
        rows.append(("all", {**totals, "score": scores.pop() if len(scores) == 1 else None}))
    width = max(len(name) for name, _ in rows)
    for name, cell in rows:
        right = "no test data"
        if cell is not None:
            counted = f"{form.right(cell['correct'])}/{form.count(cell['total'])}"
            score = f"  {cell['score']}" if cell.get("score") else ""
            right = f"{cell['correct'] / cell['total']:.4f}  {counted}{score}"
        print(f"{name:<{width}}  {right}")


def export(
    state: StateFolder,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to write; must not exist.")],
    json: Json = False,
) -> None:
    """Write the tuned LoRA in PEFT's format, with the head and the class names beside it."""
    from perpetune.cli.common import print_json
    from perpetune.errors import StateError
    from perpetune.export import export_learned
    from perpetune.learner import Learner

    learner = Learner.load(state, device="cpu")
    if not learner.state.committed:
        raise StateError(f"{state} has learned nothing yet: `perpetune update` or `run` it first")
    written = export_learned(learner.method, learner.backbone, folder)
    if json:
        print_json({"files": [str(p) for p in written]})
    else:
        print(f"{folder}: {', '.join(str(p.relative_to(folder)) for p in written)}")


VERBS = (predict, evaluate, export)
