"""Files that are complete or do not exist. They are written under another name, synced to the disk, and then renamed;
reading checks them."""

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
    """Write `content` to the file `path`. After a crash, the file is the old one or the new one."""
    aside = path.with_name(f".{path.name}.tmp")
    _write_synced(aside, content)
    os.replace(aside, path)
    _sync_folder(path.parent)


def write_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Make the new folder `path` with `files` and a manifest of their hashes."""
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
    """The size and the SHA-256 of each file in a folder from `write_folder`, as its manifest gives them.

    Raises:
        StateError: the manifest is missing or damaged.
    """
    try:
        hashes = json.loads((path / MANIFEST).read_bytes())
        return {_plain(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in hashes.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise StateError(f"{path / MANIFEST} is missing or torn ({_reason(error)}): {cure}") from None


def read_folder(
    path: Path, cure: str = "restore it from a backup", only: Collection[str] | None = None
) -> dict[str, bytes]:
    """The contents of the files in a folder from `write_folder`, by name.

    Args:
        cure: the end of the error message: what the user can do about a damaged folder.
        only: names of files; only those of them that exist are read. None reads all files.

    Raises:
        StateError: a file is missing, damaged or changed; the message names it.
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
                f"{path / name} is torn or was changed ({len(content)} bytes; the manifest has {size} bytes and their "
                f"hash): {cure}"
            )
        files[name] = content
    return files


def remove_folder(path: Path) -> None:
    """Delete a folder. It is renamed first, so that a crash leaves no half of it under its name."""
    if path.exists():
        aside = path.with_name(f".{path.name}.gone")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(path, aside)
        shutil.rmtree(aside)


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files and folders that a crash left in `folder`."""
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
    if os.name == "posix":  # other systems cannot open a folder; there the rename alone is safe enough
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _plain(name: str) -> str:
    """`name`; ValueError if it is not a plain file name, such as a path to another folder."""
    if "\0" in name or Path(name).name != name:
        raise ValueError(name)
    return name


def _reason(error: Exception) -> str:
    return (error.strerror or type(error).__name__) if isinstance(error, OSError) else "not valid JSON of its kind"
