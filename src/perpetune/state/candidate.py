"""A task that is learned aside, in STATE/candidate/, until the gate has decided whether it becomes part of the state.

Until then nothing else in the state folder changes: lines of the journal wait in memory, and checkpoints lie in
candidate/resume/. A commit first writes the lines that wait, and deletes the folder at its end; a refusal deletes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perpetune.documents import Candidate, read_document
from perpetune.errors import StateError
from perpetune.files import check_no_link, remove_folder, remove_leftovers, to_json, write_file
from perpetune.plain import MOST_YAML, read_regular

FOLDER, HEADER, RESUME = "candidate", "candidate.json", "resume"


def begin(state: Path, about: Mapping[str, Any]) -> None:
    """Make the folder of a candidate, or go on with it.

    Args:
        state: the state folder.
        about: `task`, `name`, `fingerprint`, `from` and `gate`.
    """
    folder = state / FOLDER
    check_no_link(folder)
    folder.mkdir(exist_ok=True)
    remove_leftovers(folder)
    content = to_json(dict(about))
    path = folder / HEADER
    if not path.is_file() or path.read_bytes() != content:
        write_file(path, content)


def begun(state: Path) -> dict[str, Any] | None:
    """What `begin` has written; None if there is no candidate.

    Raises:
        StateError: the file is torn or another one.
    """
    path = state / FOLDER / HEADER
    if not path.is_file():
        return None
    cure = f"delete {state / FOLDER}, and the task begins again"
    try:
        content = read_regular(path, MOST_YAML)
    except OSError as error:
        raise StateError(f"{path} cannot be read ({error.strerror}): {cure}") from None
    return read_document(Candidate, content, str(path), cure)


def drop(state: Path) -> None:
    """Delete the folder of a candidate, if there is one."""
    remove_folder(state / FOLDER)
