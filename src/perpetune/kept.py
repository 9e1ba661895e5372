"""Features of test examples that are kept in the state folder from one process to the next.

They lie in STATE/kept/, one file for each set of examples and each digest of what makes their features. Nothing else
of the state depends on these files: they are outside the chain of hashes, and the folder may be deleted at any time. A
file that is torn, of another key or not ours is not used, and its features are computed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from perpetune.files import remove_leftovers, write_file
from perpetune.models.backbone import Backbone
from perpetune.models.keeping import Keeper, Key, Table
from perpetune.plain import Malformed, parse_json, read_regular
from perpetune.recipe import Recipe
from perpetune.runtime import Runtime

FOLDER = "kept"
NAME = re.compile(r"00-[0-9a-f]{64}\.safetensors")
TENSOR = "features"
HEADER = 2**12  # most bytes before the tensor
SPARE = 2**26
"""Bytes of tables that stay in memory while their tasks wait for their turn."""
SELDOM = 1 / 8
"""The folder is looked through when so many files were written, as a share of those in it."""
DECIDE = ("perpetune", "torch", "transformers", "timm", "open_clip_torch", "numpy", "pillow")
"""Packages whose version can change the bits of a feature."""


def kept_features(folder: Path, recipe: Recipe, backbone: Backbone, fingerprint: str, run: Runtime) -> KeptFeatures:
    """The kept features of a state.

    Args:
        folder: the state folder.
        fingerprint: that of the frozen weights.
    """
    versions = {}
    for name in DECIDE:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else run.device.type
    decides = {
        "weights": fingerprint,
        "backbone": recipe.backbone.model_dump(mode="json", exclude={"name"}),
        "batch": recipe.evaluate.batch_size,  # the last bits of a feature depend on what it is computed with
        "processes": [run.rank, run.world],
        "threads": torch.get_num_threads(),
        "precision": run.precision,
        "compile": recipe.run.compile,
        "device": device,
        "versions": versions,
    }
    salt = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
    most = int(recipe.evaluate.keep * 2**30)
    place = folder / FOLDER if run.world == 1 else None  # several processes keep theirs in memory
    return KeptFeatures(backbone, salt, most, place, run.progress.note)


class KeptFeatures(Keeper):
    """A keeper whose tables outlive the process.

    Args:
        folder: STATE/kept; None keeps tables in memory alone.
        note: is told once of what cannot be kept.
    """

    def __init__(self, backbone: Backbone, salt: str, most: int, folder: Path | None, note: Callable[[str], None]):
        super().__init__(backbone, salt, most)
        self.folder, self.note = folder, note
        self._missing: set[Key] = set()
        self._stored: set[Key] = set()
        self._told = False
        self._spare: dict[Key, Table] = {}  # tables that wait for their turn; their files are there too
        self._spare_bytes = 0
        self._lying: int | None = None  # files in the folder, when it was looked through last
        self._written, self._room = 0, 0  # files since then, and the bytes that were free then and are still

    def table(self, key: Key) -> Table | None:
        found = self.tables.get(key)
        if found is None and self.folder is not None and key not in self._missing:
            found = self._from_spare(key) or self._read(key)
            if found is None or self.bytes + found.bytes > self.most:
                self._missing.add(key)
                return None
            self.tables[key] = found
            self._stored.add(key)
        return found

    def settle(self, since: float | None = None) -> None:
        """End an evaluation: store what is new and worth it, and drop what it has not used.

        Args:
            since: if not all tasks were asked, what was used after this time is not dropped; in seconds since 1970.
        """
        for key, table in list(self.tables.items()):
            whole = bool(table.known.all())
            stays = key in self.used or (since is not None and self.folder is None)
            if not stays or not whole:
                del self.tables[key]
            if not stays and whole and key in self._stored:
                self._spare[key] = table
                self._spare_bytes += table.bytes
        self._drop_spare(0 if since is None else min(SPARE, self.most))
        if self.folder is not None:
            try:
                self._settle(self.folder, since)
            except OSError as error:
                self._say(
                    f"kept features cannot be stored in {self.folder} ({error.strerror}): they are computed again"
                )
                self.folder = None
        if self.left_out:
            sets = len({examples for examples, _ in self.left_out})
            self._say(
                f"the features of {sets} sets of test examples are computed each time, because kept ones have "
                f"{self.most / 2**30:g} GiB (evaluate.keep)"
            )
        self.used, self.left_out, self._missing = set(), set(), set()

    def _settle(self, folder: Path, since: float | None) -> None:
        new = [key for key in self.tables if key not in self._stored]
        if not folder.is_dir() and not new:
            return
        if folder.is_symlink():
            raise OSError(0, "it is a link")
        folder.mkdir(exist_ok=True)
        wanted = {_name(key) for key in self.tables}
        packed = {key: _packed(key, self.tables[key]) for key in new}
        size = sum(map(len, packed.values()))
        if since is None or self._lying is None or self._written >= SELDOM * self._lying or size > self._room:
            remove_leftovers(folder)
            dropped, self._lying, others = _unused(folder, wanted, since, self.most - self.bytes)
            for path in dropped:
                path.unlink(missing_ok=True)
            names = {path.name for path in dropped}
            for key in [key for key in self._spare if _name(key) in names]:
                self._from_spare(key)
            self._written, self._room = 0, self.most - self.bytes - others + size
        for key, content in packed.items():
            write_file(folder / _name(key), content)
            self._stored.add(key)
        self._written, self._room = self._written + len(new), self._room - size
        self._stored &= set(self.tables)
        if since is not None:
            for name in wanted:
                with contextlib.suppress(FileNotFoundError):  # somebody has deleted it, and may
                    os.utime(folder / name)

    def _drop_spare(self, most: int) -> None:
        """Drop those spare tables that were used longest ago, until the others have at most so many bytes."""
        while self._spare_bytes > most:
            self._from_spare(next(iter(self._spare)))

    def _from_spare(self, key: Key) -> Table | None:
        found = self._spare.pop(key, None)
        self._spare_bytes -= 0 if found is None else found.bytes
        return found

    def _read(self, key: Key) -> Table | None:
        assert self.folder is not None
        try:
            if self.folder.is_symlink():
                return None
            content = read_regular(self.folder / _name(key), self.most + HEADER)
        except OSError:
            return None
        return _unpacked(key, content)

    def _say(self, message: str) -> None:
        if not self._told:
            self._told = True
            self.note(message)


def _unused(folder: Path, wanted: Collection[str], since: float | None, room: int) -> tuple[list[Path], int, int]:
    """The files to be dropped: those that are not `wanted`, but for those that were used after `since` while there is
    `room` for them, in bytes; with the number of our files, and the bytes of those that stay and are not `wanted`."""
    with os.scandir(folder) as entries:  # one for each task, so it matters how long one takes
        ours = [entry for entry in entries if NAME.fullmatch(entry.name)]
        others = [entry for entry in ours if entry.name not in wanted]
        if since is None:
            return [Path(entry.path) for entry in others], len(ours), 0
        dropped, left = list[Path](), room
        for about, path in sorted(((e.stat(), e.path) for e in others), key=lambda one: -one[0].st_mtime):
            if about.st_size > left or about.st_mtime < since:
                dropped.append(Path(path))
            else:
                left -= about.st_size
        return dropped, len(ours), room - left


def _name(key: Key) -> str:
    return f"00-{hashlib.sha256(' '.join(key).encode()).hexdigest()}.safetensors"


def _packed(key: Key, table: Table) -> bytes:
    """A table as the content of a file: safetensors, with the key and a hash in its metadata."""
    return save({TENSOR: table.rows.contiguous()}, {"key": " ".join(key), "sha256": _hash(key, table.rows)})


def _unpacked(key: Key, content: bytes) -> Table | None:
    """The table in a file; None if it is torn or has another key."""
    try:
        size = int.from_bytes(content[:8], "little")
        header = parse_json(content[8 : 8 + size]) if size <= HEADER else None
        told = header.get("__metadata__") if isinstance(header, Mapping) else None
        if not isinstance(told, Mapping) or told.get("key") != " ".join(key):
            return None
        rows = load(content)[TENSOR]
    except (Malformed, SafetensorError, KeyError, ValueError):
        return None
    if rows.dim() != 2 or not rows.is_floating_point() or told.get("sha256") != _hash(key, rows):
        return None
    return Table(rows, torch.ones(len(rows), dtype=torch.bool))


def _hash(key: Key, rows: Tensor) -> str:
    digest = hashlib.sha256(f"{key} {rows.dtype} {tuple(rows.shape)}".encode())
    digest.update(rows.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
