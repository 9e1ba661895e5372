"""Files that are complete or do not exist. They are written under another name, synced to the disk, and then renamed;
reading checks them."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from perpetune.errors import StateError
from perpetune.plain import parse_json, read_regular

MANIFEST = "manifest.json"
MOST_MANIFEST = 2**24
OURS = re.compile(
    r"\.(recipe\.yaml|backbone\.json|journal\.jsonl|task\.json|resume|candidate(\.json)?|(report|compare|comparison)\.(html|md|json)|\d{2,}-.+)"
    r"(\.[0-9a-f]{16})?\.(tmp|gone)"
)
"""Temporary names in a state folder. Those of older versions have no random part."""


def to_json(value: Any, lines: int | None = None) -> bytes:
    """JSON for a file that people may read: each entry on a line of its own, or with `lines` those of so many levels.

    An object of ten thousand small ones takes a quarter of the bytes if these stand on one line each.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False) if lines is None else on_lines(value, lines)
    return (text + "\n").encode()


def on_lines(value: Any, lines: int, start: str = "\n", *, finite: bool = False) -> str:
    """JSON in which the entries of so many levels stand on a line each.

    Args:
        finite: raise ValueError for infinity and for what is no number.
    """
    if not lines or not isinstance(value, (dict, list)) or not value:
        return json.dumps(value, ensure_ascii=False, allow_nan=not finite)
    inside = start + " "
    if isinstance(value, list):
        parts, (left, right) = [on_lines(part, lines - 1, inside, finite=finite) for part in value], "[]"
    else:
        keyed = {json.dumps(key, ensure_ascii=False): part for key, part in value.items()}
        parts = [f"{key}: {on_lines(part, lines - 1, inside, finite=finite)}" for key, part in keyed.items()]
        left, right = "{}"
    return left + inside + f",{inside}".join(parts) + start + right


def write_file(path: Path, content: bytes) -> None:
    """Write `content` to the file `path`. After a crash, the file is the old one or the new one.

    Where `path` is a link, the link is replaced; what it points to stays as it is.
    """
    aside = _aside(path, "tmp")
    try:
        _write_synced(aside, content)
        os.replace(aside, path)
    except OSError as error:  # such as a full disk, or a folder that has the file's name
        with contextlib.suppress(OSError):
            aside.unlink()
        raise about(error, path) from None
    _sync_folder(path.parent)


def write_folder(path: Path, files: Mapping[str, bytes]) -> str:
    """Make the new folder `path` with `files` and a manifest of their hashes; return the manifest's own SHA-256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside(path, "tmp")
    try:
        aside.mkdir()
        manifest = manifest_of({name: entry_of(content) for name, content in files.items()})
        write_synced(aside, {**files, MANIFEST: manifest})
        os.rename(aside, path)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise about(error, path) from None
    _sync_folder(path.parent)
    return hashlib.sha256(manifest).hexdigest()


def entry_of(content: bytes) -> tuple[int, str]:
    """The size and the SHA-256 of a file, as a manifest has them."""
    return len(content), hashlib.sha256(content).hexdigest()


def manifest_of(entries: Mapping[str, tuple[int, str]]) -> bytes:
    """A manifest, from the size and the SHA-256 of each file."""
    return to_json({name: {"bytes": size, "sha256": digest} for name, (size, digest) in entries.items()})


def write_synced(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write new files into a folder, and sync them and the folder to the disk."""
    for name, content in files.items():
        _write_synced(folder / name, content)
    _sync_folder(folder)


def replace_synced(source: Path, target: Path) -> None:
    """Give the file `source` the name `target` in the same folder, in the place of what has that name."""
    os.replace(source, target)
    _sync_folder(target.parent)


def about(error: OSError, path: Path) -> OSError:
    """`error`, with the name that a user knows in the place of a temporary one."""
    return error if error.errno is None else OSError(error.errno, error.strerror, str(path))  # of the class of errno


def listed(
    path: Path, cure: str = "restore it from a backup", digests: Collection[str] = ()
) -> dict[str, tuple[int, str]]:
    """The size and the SHA-256 of each file in a folder from `write_folder`, as its manifest gives them.

    Args:
        cure: the end of the error message: what the user can do about a damaged folder.
        digests: one of them is the SHA-256 that the manifest must have; none where nobody knows it.

    Raises:
        StateError: the manifest is missing or damaged, or another one than `digests` say.
    """
    try:
        content = read_regular(path / MANIFEST, MOST_MANIFEST)
        hashes = parse_json(content)
        found = {_plain(name): _entry(entry) for name, entry in hashes.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise StateError(f"{path / MANIFEST} is missing or torn ({_reason(error)}): {cure}") from None
    if digests and hashlib.sha256(content).hexdigest() not in digests:
        raise StateError(
            f"{path / MANIFEST} is not the one that was written when the task was committed (the journal has its "
            f"hash): the folder is another one's, or was changed: {cure}"
        )
    return found


def manifest_digest(path: Path) -> str:
    """The SHA-256 of the manifest of a folder from `write_folder`.

    Raises:
        StateError: the manifest cannot be read.
    """
    listed(path)
    return hashlib.sha256(read_regular(path / MANIFEST, MOST_MANIFEST)).hexdigest()


def read_folder(
    path: Path,
    cure: str = "restore it from a backup",
    only: Collection[str] | None = None,
    digests: Collection[str] = (),
) -> dict[str, bytes]:
    """The contents of the files in a folder from `write_folder`, by name.

    Args:
        cure: the end of the error message: what the user can do about a damaged folder.
        only: names of files; only those of them that exist are read. None reads all files.
        digests: one of them is the SHA-256 that the manifest must have; none where nobody knows it.

    Raises:
        StateError: a file is missing, damaged or changed; the message names it.
    """
    entries = listed(path, cure, digests)
    return read_listed(path, {name: e for name, e in entries.items() if only is None or name in only}, cure)


def read_listed(path: Path, entries: Mapping[str, tuple[int, str]], cure: str) -> dict[str, bytes]:
    """The contents of some files in a folder, by name, checked against their `entries` in its manifest."""
    files = {}
    for name, (size, expected) in entries.items():
        try:
            there = os.stat(path / name).st_size
            content = read_regular(path / name, size) if there == size else b""
        except OSError as error:
            raise StateError(f"{path / name} cannot be read ({_reason(error)}): {cure}") from None
        if there != size or len(content) != size or hashlib.sha256(content).hexdigest() != expected:
            raise StateError(
                f"{path / name} is torn or was changed ({there} bytes; the manifest has {size} bytes and their "
                f"hash): {cure}"
            )
        files[name] = content
    return files


def seal_folder(path: Path) -> None:
    """Write the manifest of the files that another library has put into the folder `path`, and sync all to the disk."""
    hashes = {}
    for file in sorted(path.iterdir()):
        hashes[file.name] = {"bytes": file.stat().st_size, "sha256": digest_of(file)}
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
    _write_synced(path / MANIFEST, to_json(hashes))
    _sync_folder(path)


def check_folder(path: Path) -> None:
    """Check the files in a folder from `write_folder` or `seal_folder`, without holding them in memory.

    Raises:
        StateError: a file is missing, damaged or changed; the message names it.
    """
    for name, (size, expected) in listed(path).items():
        try:
            whole = os.stat(path / name).st_size == size and digest_of(path / name) == expected
        except OSError as error:
            raise StateError(f"{path / name} cannot be read ({_reason(error)})") from None
        if not whole:
            raise StateError(f"{path / name} is torn or was changed")


def digest_of(file: Path) -> str:
    """The SHA-256 of a file, read in parts."""
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while part := opened.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def remove_folder(path: Path) -> None:
    """Delete a folder. It is renamed first, so that a crash leaves no half of it under its name.

    Raises:
        StateError: it is a link.
    """
    check_no_link(path)
    if path.exists():
        aside = _aside(path, "gone")
        os.rename(path, aside)
        shutil.rmtree(aside)


def sync_files(folder: Path) -> None:
    """Sync all files below a folder, and the folders, to the disk."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            path = os.path.join(root, name)
            if os.path.isfile(path) and not os.path.islink(path):
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        _sync_folder(Path(root))


def exchange(one: Path, other: Path) -> None:
    """Let two folders of one file system change their names in one step, so that at every instant both are there.

    Raises:
        OSError: the system or the file system has no such step; nothing was changed.
    """
    names = os.fsencode(one), os.fsencode(other)
    library: Any = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    if hasattr(library, "renameat2"):  # Linux; -100 is the current folder, 2 is RENAME_EXCHANGE
        failed = library.renameat2(-100, names[0], -100, names[1], 2)
    elif hasattr(library, "renamex_np"):  # macOS; 2 is RENAME_SWAP
        failed = library.renamex_np(*names, 2)
    else:
        raise OSError(errno.ENOSYS, "there is no exchange of names here", str(other))
    if failed:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(other))
    _sync_folder(other.parent)


def check_no_link(path: Path) -> None:
    """StateError if `path` is a link."""
    if path.is_symlink():
        raise StateError(
            f"{path} is a link: perpetune writes and removes nothing through links; put the folder or file itself there"
        )


def remove_leftovers(folder: Path) -> list[str]:
    """Delete the temporary files and folders that a crash of ours left in `folder`; return their names."""
    removed = []
    for name in os.listdir(folder) if folder.is_dir() else ():  # a name for each task, so it matters how long one takes
        if not name.startswith(".") or not OURS.fullmatch(name):
            continue  # somebody else's
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()  # of a link the link alone
        removed.append(path.name)
    return removed


def _aside(path: Path, suffix: str) -> Path:
    """A name beside `path` that nobody can guess, so that nobody can have put a link there."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.{suffix}")


def _write_synced(path: Path, content: bytes) -> None:
    with open(path, "xb") as file:  # x: it is new, and no link
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
    os.fsencode(name)  # a ValueError where half a character stands in it
    return name


def _entry(entry: dict[str, Any]) -> tuple[int, str]:
    """The size and the hash of one file; ValueError if they are none."""
    size, digest = entry["bytes"], entry["sha256"]
    if isinstance(size, bool) or not isinstance(size, int) or size < 0:
        raise ValueError(size)
    if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
        raise ValueError(digest)
    return size, digest


def _reason(error: Exception) -> str:
    return (error.strerror or type(error).__name__) if isinstance(error, OSError) else "not valid JSON of its kind"
