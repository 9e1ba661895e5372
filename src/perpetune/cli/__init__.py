"""The command line. The verbs are in seven modules: `run` has run; `learn` has init, update, resume, rollback, forget,
prune and relocate; `costs` has estimate; `use` has predict, find, evaluate, drift and export; `serving` has serve;
`hub` has push and pull; `look` has report, log, compare and the lists of choices."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import typer

from perpetune.cli import costs, hub, learn, lines, look, run, serving, use
from perpetune.cli.failure import unforeseen
from perpetune.cli.output import drop, encode_anything
from perpetune.errors import PerpetuneError, UsageError, closest

app = typer.Typer(
    name="perpetune",
    help="Keep tuning a pretrained model as new data arrive: without forgetting, without keeping old data.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
for module in (run, learn, costs, use, serving, hub, look):
    for verb in module.VERBS:
        app.command()(verb)

# The class of errors about arguments. It is click's class, or the class of the copy of click inside newer typers.
ArgumentError: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


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
    """Run one command and exit with its code: 0 for success, 1 when the work failed, 2 when an argument is wrong."""
    if sys.getfilesystemencoding() == "ascii":  # LC_ALL=C PYTHONUTF8=0: a path with other letters could not be stored
        begin = [sys.executable, "-X", "utf8", *sys.orig_argv[1:]]
        os.execve(sys.executable, begin, {**os.environ, "PYTHONUTF8": "1"})  # for further processes too
    sys.path.append(os.getcwd())  # so that PACKAGE.MODULE:CLASS finds modules in the current folder
    warnings.showwarning = _show_warning
    encode_anything()
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # without a network, the hub prints every attempt
    code = call(list(sys.argv[1:] if arguments is None else arguments))
    lines.leave()
    sys.exit(code)


def call(arguments: list[str]) -> int:
    """Run one command and return its exit code. A failure prints one line on standard error; a command that writes
    lines of JSON writes it there too."""
    lines.close()
    before = sys.stdout
    try:
        command = typer.main.get_command(app)
        _check_twice(command, arguments)
        return int(command(args=arguments or ["--help"], prog_name="perpetune", standalone_mode=False) or 0)
    except PerpetuneError as error:
        if os.environ.get("PERPETUNE_DEBUG"):
            raise
        return _failed(str(error), error.exit_code)
    except ArgumentError as error:
        _say(_usage(error))
        return int(error.exit_code)
    except typer.Abort as stop:
        if isinstance(stop.__cause__, EOFError):  # typer takes it for Ctrl-D, but a torn file raises it too
            return _failed(unforeseen(stop.__cause__), 1)
        return 130
    except BrokenPipeError:  # the program that read our output has ended
        drop(sys.stdout)
        return 1
    except OSError as error:
        if os.environ.get("PERPETUNE_DEBUG"):
            raise
        return _failed(f"{error.filename or 'the system'}: {error.strerror or error}", 1)
    except Exception as error:
        if os.environ.get("PERPETUNE_DEBUG"):
            raise
        return _failed(unforeseen(error), 1)
    finally:
        sys.stdout = before


def _failed(text: str, code: int) -> int:
    """Say why a command failed; returns its exit code."""
    _say(text)
    with contextlib.suppress(OSError):  # whoever read the lines has ended
        lines.failed(" ".join(text.split()), code)
    return code


def _check_twice(program: Any, arguments: Sequence[str]) -> None:
    """Refuse an option that takes one value and is given twice; the parser would take the last value without a word.

    Raises:
        UsageError: there is such an option.
    """
    verb = next((a for a in arguments if not a.startswith("-")), "")
    command = getattr(program, "commands", {}).get(verb)
    given = [a.partition("=")[0] for a in itertools.takewhile(lambda a: a != "--", arguments)]
    for option in command.params if command is not None else ():
        if getattr(option, "multiple", True) or getattr(option, "is_flag", True) or option.nargs != 1:
            continue
        if sum(given.count(name) for name in option.opts) > 1:
            cure = f"run `perpetune {verb}` once for each" if "--data" in option.opts else "give it once"
            raise UsageError(f"{option.opts[0]} is given more than once, and it takes one value: {cure}")


def _usage(error: Any) -> str:
    """A message that says what is wrong with the arguments and names the command that prints the help."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "perpetune"
    text = str(error.format_message())
    if context is not None and (unknown := re.match(r"No such command '(.*?)'", text)):
        text = f"there is no verb {unknown[1]!r}; {closest(unknown[1], context.command.commands)}"
    return f"{text.rstrip('.')} (see `{path} --help`)"


def _show_warning(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
    _say(f"warning: {message}")


def _say(text: str) -> None:
    print(f"perpetune: {' '.join(text.split())}", file=sys.stderr)
