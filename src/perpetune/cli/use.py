"""The verbs that use a learned model: predict, evaluate, export."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from perpetune.cli.lines import Lines, LineView, lines
from perpetune.cli.options import DataSet, Device, Json, JsonLines, StateFolder, options_of

if TYPE_CHECKING:
    from perpetune.answers import Answer
    from perpetune.trained import Trained


def predict(
    state: StateFolder,
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="Image files, or folders of images. For a language model: prompts, .txt files with one prompt on each "
            "line, or .jsonl files with `prompt` or `messages`; - reads lines from standard input. For a "
            "vision-language model: image files, then the prompt about them.",
        ),
    ],
    top: Annotated[int, typer.Option(min=1, help="Names to print for each image or text.")] = 3,
    options: Annotated[
        str | None,
        typer.Option(help="Answers to choose among, with commas between them; with a classifier, some of its classes."),
    ] = None,
    names: Annotated[
        str | None,
        typer.Option(
            help="Classes to choose among, learned or not, with commas between them; for a head that knows classes by "
            "their names, such as `text` on CLIP."
        ),
    ] = None,
    device: Device = None,
    json: JsonLines = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV: image, then name and probability by rank.")] = False,
) -> None:
    """Print names and probabilities for images, or a language model's answers.

    Example: perpetune predict birds photos/ --top 1 --csv
    """
    from perpetune.cli.notes import Notes
    from perpetune.errors import UsageError
    from perpetune.trained import Trained

    if json and csv:
        raise UsageError("--json and --csv exclude each other: choose one of them")
    out = lines(json)
    trained = Trained.load(state, device=device, progress=Notes() if out is None else LineView(out))
    if trained.method.model.view.verb == "predict":
        _predictions(trained, inputs, top, options, out, csv, None if names is None else names.split(","))
        return
    if names is not None:
        raise UsageError("--names is for pictures: use --options with a language model")
    _answers(trained, inputs, top, options, out, csv)


def _predictions(
    trained: Trained,
    inputs: list[str],
    top: int,
    options: str | None,
    out: Lines | None,
    csv: bool,
    names: list[str] | None,
) -> None:
    import csv as csv_writer
    import sys

    from perpetune.cli.output import escaped
    from perpetune.data.names import printable, several
    from perpetune.errors import DataError, UsageError

    if options is not None:
        raise UsageError("--options works with language models only: an image classifier chooses among its classes")
    files = trained.method.model.view.typed(inputs)
    unreadable: list[str] = []
    if out is not None:
        _predicted_lines(trained, files, top, names, out, unreadable)
        if not unreadable:
            out.emit("done", predictions=len(files))
        predictions = []
    else:
        predictions = trained.predict(files, top=top, unreadable=unreadable, names=names)
    if csv:
        writer = csv_writer.writer(sys.stdout)
        ranks = range(1, max((len(p.classes) for p in predictions), default=0) + 1)
        writer.writerow(["image", *(f"{what}_{rank}" for rank in ranks for what in ("name", "probability"))])
        for p in predictions:
            writer.writerow([escaped(p.image), *(x for name, v in p.classes for x in (escaped(name), f"{v:.6f}"))])
    else:
        for p in predictions:
            print(f"{printable(p.image)}: {', '.join(f'{name} {value:.3f}' for name, value in p.classes)}")
    if unreadable:
        raise DataError(f"{len(unreadable)} of {len(files)} pictures cannot be read: {several(unreadable)}")


def _predicted_lines(
    trained: Trained, files: Sequence[Any], top: int, names: list[str] | None, out: Lines, unreadable: list[str]
) -> None:
    """Write a line for each picture as soon as its batch is answered, and one for each that cannot be read."""
    size = trained.recipe.evaluate.batch_size
    for start in range(0, len(files), size):
        bad: list[str] = []
        for p in trained.predict(files[start : start + size], top=top, unreadable=bad, names=names):
            classes = [{"name": name, "probability": value} for name, value in p.classes]
            out.emit("prediction", image=p.image, classes=classes)
        for message in bad:
            out.emit("unreadable", message=message)
        unreadable += bad


def _answers(trained: Trained, inputs: list[str], top: int, options: str | None, out: Lines | None, csv: bool) -> None:
    import dataclasses
    import sys
    from collections import Counter

    from perpetune.errors import UsageError

    if csv:
        raise UsageError("--csv works with images only: use --json for answers")
    view = trained.method.model.view
    answers = trained.answer(view.typed(inputs), options=None if options is None else options.split(","))
    if trained.method.model.chooses:  # among all classes; with the output layer, among the options of this call
        answers = [dataclasses.replace(a, options=a.options[:top]) for a in answers]
    cut = [a.cut for a in answers if a.cut]
    if cut:
        print(f"perpetune: {view.cut_note(cut, len(answers), 'prompts')}", file=sys.stderr)
    for what, count in Counter(what for a in answers for what in a.left_out).items():
        print(
            f"perpetune: in {count} of {len(answers)} prompts the model's chat template leaves out {what}",
            file=sys.stderr,
        )
    if out is not None:
        for a in answers:
            out.emit("answer", **_shown(a))
        out.emit("done", answers=len(answers))
        return
    for a in answers:
        shares = f"  ({', '.join(f'{name} {value:.3f}' for name, value in a.options)})" if a.options else ""
        print(f"{a.text}{shares}")


def _shown(answer: Answer) -> dict[str, Any]:
    """An answer as plain values, without the fields that do not apply to it."""
    from perpetune.data.texts.chats import as_dict

    prompt: Any = answer.prompt
    if not isinstance(prompt, str):
        prompt = [as_dict(message) for message in prompt]
    more = {"options": dict(answer.options), "cut": answer.cut, "left_out": list(answer.left_out)}
    return {"prompt": prompt, "answer": answer.text, **{key: value for key, value in more.items() if value}}


def find(
    state: StateFolder,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What the pictures should show: a sentence or a name.")],
    inputs: Annotated[list[str], typer.Argument(metavar="INPUT...", help="Image files, or folders of images.")],
    top: Annotated[int, typer.Option(min=1, help="Pictures to print.")] = 10,
    device: Device = None,
    json: JsonLines = False,
) -> None:
    """Print the pictures that a text describes best, with a model of pictures and texts such as CLIP.

    Example: perpetune find STATE "a dog on a beach" photos/ --top 5
    """
    from perpetune.cli.notes import Notes
    from perpetune.data.names import printable, several
    from perpetune.errors import DataError
    from perpetune.trained import Trained

    out = lines(json)
    trained = Trained.load(state, device=device, progress=Notes() if out is None else LineView(out))
    files, unreadable = trained.method.model.view.typed(inputs), list[str]()
    found = trained.find(text, files, top=top, unreadable=unreadable)
    for image, score in found:
        if out is not None:
            out.emit("found", image=image, score=score)
        else:
            print(f"{score:.4f}  {printable(image)}")
    if out is not None:
        for message in unreadable:
            out.emit("unreadable", message=message)
        if not unreadable:
            out.emit("done", found=len(found))
    if unreadable:
        raise DataError(f"{len(unreadable)} of {len(files)} pictures cannot be read: {several(unreadable)}")


def evaluate(
    state: StateFolder,
    data: Annotated[
        str | None, typer.Option(help="Labelled data; by default the test data of each learned task.")
    ] = None,
    changes: DataSet = None,
    device: Device = None,
    json: JsonLines = False,
) -> None:
    """Print the accuracy on test data.

    Example: perpetune evaluate birds --data photos/checked
    """
    from perpetune.cli.notes import Notes
    from perpetune.errors import UsageError
    from perpetune.report import form
    from perpetune.trained import Trained

    options = options_of(changes)
    if options and data is None:
        raise UsageError("--set names keys of the data section of --data, and there is no --data")
    out = lines(json)
    progress = Notes() if out is None else LineView(out)
    cells = Trained.load(state, device=device, progress=progress).evaluate(data, options=options)
    if out is not None:
        for name, cell in cells.items():
            out.emit("evaluated", name=name, cell=cell)
        out.emit("done", cells=cells)
        return
    rows = list(cells.items())
    known = [c for c in cells.values() if c is not None]
    if len(known) > 1:
        scores = {c.get("score") for c in known}  # if they differ, the sum belongs to no score
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


def drift(
    state: StateFolder,
    data: Annotated[
        str,
        typer.Option(
            help="Pictures, or for a language model prompts: a folder, a file, or whatever `update --data` takes. "
            "Labels are not looked at."
        ),
    ],
    level: Annotated[
        float, typer.Option(metavar="SHARE", help="Share of months like what was learned that may be flagged.")
    ] = 0.05,
    changes: DataSet = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Say whether new data look like what was learned. The exit code is 4 if they do not, else 0.

    Example: perpetune drift birds --data photos/
    """
    from perpetune.cli.common import print_json
    from perpetune.cli.notes import Notes
    from perpetune.data.names import printable, several
    from perpetune.trained import Trained

    notes, unreadable = Notes(), list[str]()
    trained = Trained.load(state, device=device, progress=notes)
    options = options_of(changes)
    found = trained.drift(data, level=level, options=options, unreadable=unreadable)
    noun = trained.method.model.view.noun
    if unreadable:
        notes.note(f"{len(unreadable)} {noun} cannot be read and are left out: {several(unreadable)}")
    if found["copies"]:
        notes.note(f"{found['copies']} {noun} are copies of others and count once")
    if json:
        print_json(found)
    else:
        features, far = found["tests"]["features"], found["tests"]["far"]
        rows = [["", "here", "expected", "chance"]]
        rows.append(["distance of features", f"{features['distance']:.4f}", "", _chance(features["chance"])])
        share = [f"{100 * far[key]:.1f} %" for key in ("share", "expected")]
        rows.append(["far from every class", *share, _chance(far["chance"])])
        for row in rows:
            print(f"{row[0]:<20}  {row[1]:>8}  {row[2]:>8}  {row[3]:>8}".rstrip())
        if found["far"]:
            print(f"far from every class: {several([printable(name) for name in found['far']])}")
        verdict = "do not look like what was learned" if found["drift"] else "look like what was learned"
        print(
            f"{'drift' if found['drift'] else 'no drift'}: {found['examples']} {noun} {verdict} ({found['known']} "
            f"held-out ones; level {level:g})"
        )
    if found["drift"]:
        raise typer.Exit(DRIFT)


DRIFT = 4
"""The exit code of `drift` where there is one."""


def _chance(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def export(
    state: StateFolder,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to write; must not exist.")],
    to: Annotated[
        str,
        typer.Option(
            help="The form. peft: the trained LoRA in PEFT's format, and the head beside it. merged: a whole model of "
            "transformers or timm, with what was trained in its weights. onnx: one graph from pixels to scores."
        ),
    ] = "peft",
    images: Annotated[
        list[str] | None,
        typer.Option(
            help="Image files, or folders of images, with which the export is checked against the state (at most 500); "
            "by default handwritten digits. Can be given several times."
        ),
    ] = None,
    json: JsonLines = False,
) -> None:
    """Write what was learned for other programs: the adapter, a whole model, or a graph. Each export has a model card.

    Example: perpetune export STATE my-model --to merged --images photos/
    """
    from perpetune.cli.notes import Notes
    from perpetune.trained import Trained

    out = lines(json)
    trained = Trained.load(state, device="cpu", progress=Notes() if out is None else LineView(out))
    written = trained.export(folder, to=to, images=images)
    if out is not None:
        for path in written:
            out.emit("file", path=str(path), bytes=path.stat().st_size)
        out.emit("done", files=[str(p) for p in written])
    else:
        print(f"{folder}: {', '.join(str(p.relative_to(folder)) for p in written)}")


VERBS = (predict, find, evaluate, drift, export)
