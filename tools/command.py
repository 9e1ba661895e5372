"""A function as the command line of its file."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import typer

from perpetune.errors import PerpetuneError


def command(function: Callable[..., Any]) -> None:
    """Call a function with the arguments of this process. What it raises on purpose is one line."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(function)
    try:
        app()
    except PerpetuneError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
