"""The command line. Verbs live in `learn` (run, init, update, resume, rollback), `use` (predict, evaluate,
export) and `look` (report, log, compare, and what there is to choose from)."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import typer

from perpetune.cli import learn, look, use
from perpetune.errors import PerpetuneError

app = typer.Typer(
    name="perpetune",
    help="Keep tuning a pretrained model as new data arrive: without forgetting, without keeping old data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for module in (learn, use, look):
    for verb in module.VERBS:
        app.command()(verb)


def _version(asked: bool) -> None:
    if asked:
        from perpetune._version import __version__

        print(f"perpetune {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: bool = typer.Option(False, "--debug", help="Show a traceback when something fails."),
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    if debug:
        os.environ["PERPETUNE_DEBUG"] = "1"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and leave with its exit code: 0 fine, 1 the work failed, 2 bad usage."""
    sys.exit(call(list(sys.argv[1:] if arguments is None else arguments)))


def call(arguments: list[str]) -> int:
    """Run one command; returns its exit code. A failure is one line on standard error."""
    try:
        return int(app(args=arguments, prog_name="perpetune", standalone_mode=False) or 0)
    except PerpetuneError as error:
        if os.environ.get("PERPETUNE_DEBUG"):
            raise
        print(f"perpetune: {_one_line(str(error))}", file=sys.stderr)
        return error.exit_code
    except typer.TyperException as error:
        print(f"perpetune: {_one_line(error.format_message())} (see `perpetune --help`)", file=sys.stderr)
        return error.exit_code
    except typer.Abort:
        return 130
    except BrokenPipeError:  # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if os.environ.get("PERPETUNE_DEBUG"):
            raise
        print(f"perpetune: {error.filename or 'the system'}: {error.strerror or error}", file=sys.stderr)
        return 1


def _one_line(text: str) -> str:
    return " ".join(text.split())
