"""Folders of pictures: a folder for each class, or a folder for each domain (or task) with a folder for each class."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Literal

from perpetune.data.names import label_of, printable, several
from perpetune.data.pictures.read import list_folder, walk
from perpetune.data.pictures.tables import FileTable
from perpetune.data.sources import Fit, Kind, Source, existing
from perpetune.errors import DataError

Layout = Literal["auto", "classes", "domains"]

_TEST = ("test", "val", "valid", "validation")  # the first of these folders that exists is the test split


class FolderSource(Source):
    """`PATH/CLASS/*.png`, or `PATH/DOMAIN/CLASS/*.png`, where a domain can also mean a task.

    A split may be the first folder (`PATH/train/…`, and `PATH/test/…` or `PATH/val/…`) or the second folder
    (`PATH/DOMAIN/train/CLASS/…`). A class folder is read with all folders inside it. Hidden files are ignored. Other
    files that are not pictures are ignored with a warning.

    Args:
        path: the folder.
        test: the folder with the test pictures, in the same layout; default: the test split inside `path`, if any.
        layout: `auto` reads a folder with pictures as a class, and a folder that has only folders with pictures as a
            domain.
    """

    def __init__(self, *, path: str, test: str | None = None, layout: Layout = "auto"):
        self.path = path
        self.test_path = test
        self.layout = layout

    @classmethod
    def fits(cls, path: str, wanted: Kind | None = None) -> Fit:
        return Fit.ANY if os.path.isdir(path) else Fit.NO

    def train(self) -> FileTable:
        root, _, warnings = self._roots
        table = _scan(root, self._layout, inner=("train",) if self._inner else ())
        table.warnings += warnings
        if not len(table):
            raise DataError(
                f"{printable(root)}: no pictures in class folders; expected {_expected(self._layout)}"
                + (f" ({several(table.warnings, 1)})" if table.warnings else "")
            )
        return table

    def test(self) -> FileTable | None:
        root = self._roots[1]
        if root is not None:
            table = _scan(root, self._layout, inner=())
        elif self._inner:
            table = _scan(self._roots[0], self._layout, inner=_TEST)
        else:
            return None
        return table if len(table) else None

    @cached_property
    def _roots(self) -> tuple[str, str | None, list[str]]:
        """The folder of the training pictures, the folder of the test pictures or None, and warnings."""
        folders = list_folder(existing(self.path, "folder"))[0]
        if "train" not in folders:
            if self.test_path is not None:
                existing(self.test_path, "folder")
            return self.path, self.test_path, []
        splits = [s for s in _TEST if s in folders]
        inside = [self.test_path] if self.test_path else [os.path.join(self.path, s) for s in splits]
        unused = [f for f in folders if f != "train" and f not in splits] + (splits if self.test_path else splits[1:])
        warnings = [f"{printable(self.path)}: not used beside train: {several(unused)}"] if unused else []
        test = existing(inside[0], "folder") if inside else None
        return os.path.join(self.path, "train"), test, warnings

    @cached_property
    def _inner(self) -> bool:
        """Whether each folder under `path` has splits of its own."""
        root, test, _ = self._roots
        folders = [list_folder(os.path.join(root, f))[0] for f in list_folder(root)[0]] if test is None else []
        return bool(folders) and all("train" in f for f in folders)

    @cached_property
    def _layout(self) -> Layout:
        """`classes` or `domains`, found out from the training pictures if need be."""
        if self.layout != "auto":
            return self.layout
        root = self._roots[0]
        direct, deeper = [], []
        for folder in list_folder(root)[0]:
            path = os.path.join(root, folder, "train") if self._inner else os.path.join(root, folder)
            folders, pictures, _ = list_folder(path)
            if pictures:
                direct.append(printable(folder))
            elif any(walk(os.path.join(path, f))[0] for f in folders):
                deeper.append(printable(folder))
        if direct and deeper:
            raise DataError(
                f"{printable(root)}: some folders have pictures ({several(direct)}), others have only folders with "
                f"pictures ({several(deeper)}); set layout: classes or layout: domains"
            )
        return "domains" if deeper else "classes"


def _scan(root: str, layout: Layout, inner: tuple[str, ...]) -> FileTable:
    """The pictures in `root`; with `inner`, only those in the first of these folders that each class or domain has."""
    paths: list[str] = []
    labels: list[str] = []
    groups: list[str] = []
    empty: list[str] = []
    folders, loose, others = list_folder(root)
    others += loose
    for top in folders:
        part = top
        if inner:
            have = list_folder(os.path.join(root, top))[0]
            part = next((f"{top}/{split}" for split in inner if split in have), "")
            if not part:
                continue
        if layout == "classes":
            leaves = [(part, top)]
        else:
            classes, loose, more = list_folder(os.path.join(root, part))
            others += loose + more
            leaves = [(f"{part}/{name}", name) for name in classes]
            if not leaves:
                empty.append(printable(part))
        for folder, label in leaves:
            names, more = walk(os.path.join(root, folder))
            others += more
            if not names:
                empty.append(printable(folder))
            paths += [f"{folder}/{name}" for name in names]
            labels += [label_of(label)] * len(names)
            groups += [label_of(top)] * len(names)
    warnings = []
    if empty:
        warnings.append(f"{printable(root)}: no picture in {several(empty)}")
    if others:
        warnings.append(
            f"{printable(root)}: ignored {len(others)} files that are not pictures in a class folder: "
            f"{_by_suffix(others)}"
        )
    return FileTable(root, paths, labels, groups if layout == "domains" else None, warnings)


def _by_suffix(names: Sequence[str]) -> str:
    """`12 .heic, 3 .txt`: HEIC comes first, because phones store pictures in it, which the user would miss."""
    counts = Counter(os.path.splitext(name)[1].lower() or "without a suffix" for name in names)
    order = sorted(counts, key=lambda suffix: (suffix not in (".heic", ".heif"), -counts[suffix], suffix))
    return several([f"{counts[suffix]} {printable(suffix)}" for suffix in order])


def _expected(layout: Layout) -> str:
    return "PATH/DOMAIN/CLASS/PICTURE" if layout == "domains" else "PATH/CLASS/PICTURE"
