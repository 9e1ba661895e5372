"""The help of every verb has an example that the verb takes."""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest
import typer

from perpetune.cli import app

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def examples(command: Any) -> list[str]:
    """The commands after `Example:` in a help, without their first two words."""
    text = " ".join(str(command.help).split()).partition("Example: ")[2]
    return re.findall(rf"perpetune {command.name}(?= |$)([^,]*)", text)


def parsed(command: Any, example: str) -> Any:
    """What the parser makes of an example; an error of its own if it is none."""
    return command.make_context(command.name, shlex.split(example))


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_help_has_an_example(verb: str) -> None:
    found = examples(COMMANDS[verb])
    assert found, f"the help of {verb} has no example"
    for example in found:
        parsed(COMMANDS[verb], example)


def test_an_example_that_the_verb_does_not_take_is_seen() -> None:
    with pytest.raises(Exception, match="No such option"):
        parsed(COMMANDS["prune"], "birds --kepp 3")
    with pytest.raises(Exception, match="Missing"):
        parsed(COMMANDS["rollback"], "birds")
