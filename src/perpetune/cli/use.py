"""Verbs that use what was learned: predict, evaluate, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from perpetune.cli.learn import Device, Json, StateFolder


def predict(
    state: StateFolder,
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT...", help="Image files, or folders of them.")],
    top: Annotated[int, typer.Option(min=1, help="Names to print for each image.")] = 3,
    device: Device = None,
    json: Json = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV: image, then name and probability by rank.")] = False,
) -> None:
    """Print names and probabilities for images."""
    import csv as csv_writer
    import sys

    from perpetune.cli.common import print_json
    from perpetune.data.pictures import picture_files
    from perpetune.data.text import several
    from perpetune.errors import DataError, UsageError
    from perpetune.learner import Learner

    if json and csv:
        raise UsageError("--json and --csv: choose one of them")
    files = picture_files(inputs)
    unreadable: list[str] = []
    found = Learner.load(state, device=device).predict(files, top=top, unreadable=unreadable)
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


def evaluate(
    state: StateFolder,
    data: Annotated[str | None, typer.Option(help="Labelled data; by default the test data of every task.")] = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Print the accuracy on test data."""
    from perpetune.cli.common import print_json
    from perpetune.learner import Learner

    cells = Learner.load(state, device=device).evaluate(data)
    if json:
        print_json(cells)
        return
    rows = list(cells.items())
    known = [c for c in cells.values() if c is not None]
    if len(known) > 1:
        rows.append(("all", {key: sum(c[key] for c in known) for key in ("correct", "total")}))
    width = max(len(name) for name, _ in rows)
    for name, cell in rows:
        right = "no test data"
        if cell is not None:
            right = f"{cell['correct'] / cell['total']:.4f}  {cell['correct']}/{cell['total']}"
        print(f"{name:<{width}}  {right}")


def export(
    state: StateFolder,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to write; must not exist.")],
    json: Json = False,
) -> None:
    """Write the tuned LoRA in PEFT's format, with the head and the class names beside it."""
    from perpetune.cli.common import print_json
    from perpetune.export import export_learned
    from perpetune.learner import Learner

    learner = Learner.load(state, device="cpu")
    written = export_learned(learner.method, learner.backbone, folder)
    if json:
        print_json({"files": [str(p) for p in written]})
    else:
        print(f"{folder}: {', '.join(p.name for p in written)}")


VERBS = (predict, evaluate, export)
