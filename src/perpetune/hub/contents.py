"""Which files of a state lie on the hub, and how the journals of two copies of a state stand to each other.

What is committed, and nothing else: `recipe.yaml`, `backbone.json`, the journal up to the last commit, and of each task
its manifest and the files that the manifest names. Only `README.md` is made for the hub.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from perpetune.errors import StateError
from perpetune.export.card import CARD
from perpetune.files import MANIFEST, check_folder, listed
from perpetune.plain import MOST_JSON, parse_json, read_regular
from perpetune.state import State
from perpetune.state.journal import FOLDS, MOST_JOURNAL

JOURNAL = "journal.jsonl"
PLACES = ("recipe.yaml", "backbone.json")
"""Files that name places on a computer; `relocate` changes them."""
ROOT = (*PLACES, JOURNAL)
OF_HUB = frozenset((CARD, ".gitattributes"))
"""Files that the hub and people put beside a state."""
KEPT = re.compile(r"kept/00-[0-9a-f]{64}\.safetensors")
_TASK = re.compile(r"tasks/\d{1,9}-[^/]+/[^/.][^/]*")


def belongs(path: str) -> bool:
    """Whether a path in a repository may be a file of a state."""
    return path in ROOT or bool(_TASK.fullmatch(path) or KEPT.fullmatch(path))


def committed_files(state: State, kept: bool) -> dict[str, tuple[Path, int, str | None]]:
    """The files of a state that are pushed beside its journal: by their path, where each lies, its bytes, and its
    SHA-256 if the state knows it. Each is as it was when it was committed.

    Args:
        kept: whether features of test examples (`STATE/kept`) go along.

    Raises:
        StateError: a file is missing, torn or changed; the message names it.
    """
    paths: dict[str, str | None] = dict.fromkeys(PLACES)
    for task in state.committed:
        check_folder(task.folder)
        inside = f"tasks/{task.entry}"
        paths[f"{inside}/{MANIFEST}"] = None
        entries = listed(task.folder, task.cure, task.manifests)
        paths |= {f"{inside}/{name}": digest for name, (_, digest) in entries.items()}
    if kept and (state.folder / "kept").is_dir():
        names = sorted(f"kept/{path.name}" for path in (state.folder / "kept").iterdir() if path.is_file())
        paths |= dict.fromkeys(name for name in names if KEPT.fullmatch(name))
    places = {path: state.folder / path for path in paths}
    return {path: (places[path], places[path].stat().st_size, digest) for path, digest in paths.items()}


def read_journal(folder: Path) -> bytes:
    """The bytes of the journal in a folder."""
    try:
        return read_regular(folder / JOURNAL, MOST_JOURNAL)
    except OSError as error:
        raise StateError(f"{folder / JOURNAL} cannot be read ({error.strerror}): restore it from a backup") from None


def committed_journal(state: State) -> bytes:
    """The journal without the lines of a task that was begun and is not finished."""
    content, opened = read_journal(state.folder), state.open_task()
    if opened is None:
        return content
    lines = content.splitlines(keepends=True)
    begun = max(i for i, line in enumerate(lines) if _event(line) == "task begun")
    return b"".join(lines[:begun])


def ahead(mine: bytes, other: bytes) -> tuple[list[bytes], list[bytes]]:
    """The lines that each of two journals has behind those that both begin with."""
    one, two = mine.splitlines(keepends=True), other.splitlines(keepends=True)
    same = 0
    while same < min(len(one), len(two)) and one[same] == two[same]:
        same += 1
    return one[same:], two[same:]


def decides(lines: Iterable[bytes]) -> bool:
    """Whether lines of a journal say anything about which tasks are committed."""
    return any(_event(line) in FOLDS for line in lines)


def tasks_in(lines: Iterable[bytes]) -> list[str]:
    """The names of the tasks that lines of a journal commit."""
    events: list[Mapping[str, object]] = [parse_json(line) for line in lines if _event(line) == "task committed"]
    return [str(event["name"]) for event in events]


def _event(line: bytes) -> str:
    try:
        found = parse_json(line, most=MOST_JSON)
    except ValueError:
        return ""
    return str(found.get("event")) if isinstance(found, dict) else ""
