"""Options and arguments that several verbs take."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a recipe key, such as train.epochs=3.")
]
DataSet = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A key of the data section, such as score=rouge_l, path_column=file or name=folder (the reader).",
    ),
]
Device = Annotated[str | None, typer.Option(help="Where to run: auto, cpu, cuda, cuda:1, mps.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show nothing while it runs.")]
Json = Annotated[bool, typer.Option("--json", help="Print figures as JSON.")]
JsonLines = Annotated[
    bool, typer.Option("--json", help="Print what happens as JSON, one object a line; the last one has the result.")
]
StateFolder = Annotated[Path, typer.Argument(metavar="STATE", help="A state folder.")]


def options_of(changes: Sequence[str] | None) -> dict[str, Any]:
    """The keys of a data section that `--set` gives."""
    from perpetune.recipe import apply_change

    options: dict[str, Any] = {}
    for change in changes or ():
        apply_change(options, change)
    return options
