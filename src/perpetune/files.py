"""Files that are there whole or not at all: written aside, synced, renamed into place, checked on reading."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from perpetune.errors import StateError

MANIFEST = "manifest.json"


def to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def write_file(path: Path, content: bytes) -> None:
    """Replace `path` by `content`; a crash leaves the old file or the new one."""
    aside = path.with_name(f".{path.name}.tmp")
    _write_synced(aside, content)
    os.replace(aside, path)
    _sync_folder(path.parent)


def write_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Make the folder `path`, which is not there yet, with `files` and a manifest of their hashes."""
    aside = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for name, content in files.items():
        _write_synced(aside / name, content)
    hashes = {name: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for name, c in files.items()}
    _write_synced(aside / MANIFEST, to_json(hashes))
    _sync_folder(aside)
    os.rename(aside, path)
    _sync_folder(path.parent)


def listed(path: Path, cure: str = "restore it from a backup") -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of each file of a folder that `write_folder` made, as its manifest has them.

    Raises:
        StateError: the manifest is missing or torn.
    """
    try:
        hashes = json.loads((path / MANIFEST).read_bytes())
        return {_plain(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in hashes.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise StateError(f"{path / MANIFEST} is missing or torn ({_reason(error)}): {cure}") from None


def read_folder(
    path: Path, cure: str = "restore it from a backup", only: Collection[str] | None = None
) -> dict[str, bytes]:
    """The files of a folder that `write_folder` made.

    Args:
        cure: what to do when it is torn, for the error.
        only: the names of those wanted, as far as there are such; None is all.

    Raises:
        StateError: a file is missing, torn or changed; says which.
    """
    files = {}
    for name, (size, digest) in listed(path, cure).items():
        if only is not None and name not in only:
            continue
        try:
            content = (path / name).read_bytes()
        except OSError as error:
            raise StateError(f"{path / name} cannot be read ({_reason(error)}): {cure}") from None
        if len(content) != size or hashlib.sha256(content).hexdigest() != digest:
            raise StateError(
                f"{path / name} is torn or was changed ({len(content)} bytes that do not match the manifest's {size} "
                f"bytes and hash): {cure}"
            )
        files[name] = content
    return files


def remove_folder(path: Path) -> None:
    """Take a folder out of sight in one step, then delete it."""
    if path.exists():
        aside = path.with_name(f".{path.name}.gone")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(path, aside)
        shutil.rmtree(aside)


def remove_leftovers(folder: Path) -> None:
    """Delete what a crash left aside in `folder`."""
    for path in [*folder.glob(".*.tmp"), *folder.glob(".*.gone")]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _write_synced(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened; the rename itself is durable enough there
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _plain(name: str) -> str:
    """`name`, which must be a file's and lead nowhere else."""
    if "\0" in name or Path(name).name != name:
        raise ValueError(name)
    return name


def _reason(error: Exception) -> str:
    return (error.strerror or type(error).__name__) if isinstance(error, OSError) else "not valid JSON of its kind"
