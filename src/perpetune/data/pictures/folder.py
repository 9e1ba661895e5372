"""Folders of pictures: a folder for each class, or a folder for each domain (or task) with a folder for each class."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Literal

from perpetune.data.columns import Split, split_named, splits_among
from perpetune.data.names import label_of, one_class, printable, several
from perpetune.data.pictures.read import holds_picture, list_folder, walk
from perpetune.data.pictures.tables import FileTable
from perpetune.data.sources import Fit, Kind, Source, existing
from perpetune.errors import DataError

Layout = Literal["auto", "classes", "domains"]


class FolderSource(Source):
    """`PATH/CLASS/*.png`, or `PATH/DOMAIN/CLASS/*.png`, where a domain can also mean a task.

    A split may be the first folder (`PATH/train/…`, and `PATH/test/…` or `PATH/val/…`) or the second
    (`PATH/DOMAIN/train/CLASS/…`), by any name in `columns.SPLITS`, in upper or lower case. A folder `train` that holds
    pictures itself and lies beside other folders of pictures is a class of that name. A class folder is read at any
    depth. Hidden files are ignored, other files that are not pictures too, with a warning.

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
        if not os.path.isdir(path):
            return Fit.NO
        inside = any(holds_picture(os.path.join(path, folder)) for folder in list_folder(path)[0])
        return Fit.LAYOUT if inside else Fit.ANY

    def train(self) -> FileTable:
        root, _, warnings = self._roots
        table = _scan(root, self._layout, inner=("train",) if self._inner else ())
        table.warnings += warnings + (self._unused_inside() if self._inner else [])
        if not len(table):
            raise DataError(
                f"{printable(root)}: no pictures in class folders; expected {_expected(self._layout)}"
                + (f" ({several(table.warnings, 1)})" if table.warnings else "")
                + _manifest_there(root)
            )
        return table

    def test(self) -> FileTable | None:
        root = self._roots[1]
        if root is not None:
            table = _scan(root, self._layout, inner=())
        elif self._inner:
            table = _scan(self._roots[0], self._layout, inner=("test", "validation"))
        else:
            return None
        return table if len(table) else None

    @cached_property
    def _roots(self) -> tuple[str, str | None, list[str]]:
        """Folder of the training pictures, folder of the test pictures if there is one, warnings."""
        here, folders = printable(self.path), list_folder(existing(self.path, "folder"))[0]
        splits, warnings = _splits_in(self.path, folders), []
        if "train" not in splits:
            if self.test_path is not None:
                existing(self.test_path, "folder")
            elif splits and self.layout == "auto":
                raise DataError(
                    f"{here}: holds {several(_shown(splits))}, and no folder of the training split; add one named "
                    "train, or name the folder itself to use it alone"
                )
            alike = [f for f in folders if split_named(f) and holds_picture(os.path.join(self.path, f))]
            if alike:
                what = "domain" if all(not list_folder(os.path.join(self.path, f))[1] for f in folders) else "class"
                names = several([f"'{printable(f)}'" for f in alike])
                warnings.append(f"{here}: taken for a {what}, not for a split: {names}")
            return self.path, self.test_path, warnings
        train, *again = splits["train"]
        if again:
            raise DataError(
                f"{here}: several folders of the training split: {several(_shown({'train': splits['train']}))}; "
                "name the one to learn from"
            )
        tests = [*splits.get("test", []), *splits.get("validation", [])]
        unused = [printable(f) for f in folders if f != train and f not in tests]
        unused += [printable(f) for f in (tests if self.test_path else tests[1:])] + _loose(self.path)
        if unused:
            warnings.append(f"{here}: not used beside {printable(train)}: {several(unused)}")
        test = self.test_path or (os.path.join(self.path, tests[0]) if tests else None)
        return os.path.join(self.path, train), test and existing(test, "folder"), warnings

    @cached_property
    def _inner(self) -> bool:
        """Whether each folder under `path` has splits of its own."""
        root, test, _ = self._roots
        if test is not None:
            return False
        splits = {f: _splits_in(os.path.join(root, f)) for f in list_folder(root)[0]}
        cut = [f for f, found in splits.items() if "train" in found]
        whole = [f for f in splits if f not in cut and holds_picture(os.path.join(root, f))]
        tested = [f for f in cut if len(splits[f]) > 1]
        if tested and whole:
            raise DataError(
                f"{printable(root)}: some folders have splits inside ({several([printable(f) for f in tested])}), "
                f"others not ({several([printable(f) for f in whole])}); give all of them splits, or none"
            )
        return bool(cut) and len(cut) == len(splits)

    def _unused_inside(self) -> list[str]:
        """A line on the folders beside the splits that each folder has."""
        root, unused = self._roots[0], []
        for top in list_folder(root)[0]:
            folders = list_folder(os.path.join(root, top))[0]
            splits = splits_among(folders)
            used = [splits["train"][0], *[*splits.get("test", []), *splits.get("validation", [])][:1]]
            unused += [printable(f"{top}/{f}") for f in folders if f not in used]
            unused += [f"{line} in {printable(top)}" for line in _loose(os.path.join(root, top))]
        return [f"{printable(root)}: not used beside the splits there: {several(unused)}"] if unused else []

    @cached_property
    def _layout(self) -> Layout:
        """`classes` or `domains`, found out from the training pictures if need be."""
        if self.layout != "auto":
            return self.layout
        root = self._roots[0]
        direct, deeper = [], []
        for folder in list_folder(root)[0]:
            path = os.path.join(root, folder)
            if self._inner:
                path = os.path.join(path, splits_among(list_folder(path)[0])["train"][0])
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


def _splits_in(path: str, folders: Sequence[str] | None = None) -> dict[Split, list[str]]:
    """The folders in `path` that are splits of one data set; none where such names are those of classes or domains.

    They are splits where nothing else lies there, or where the one of training holds no picture itself, but folders of
    pictures.
    """
    folders = list_folder(path)[0] if folders is None else folders
    splits = splits_among(folders)
    if not splits:
        return {}
    others = [f for f in folders if not split_named(f) and holds_picture(os.path.join(path, f))]
    if not others:
        return splits if "train" in splits or not any(list_folder(os.path.join(path, f))[1] for f in folders) else {}
    if "train" in splits and not any(list_folder(os.path.join(path, f))[1] for f in splits["train"]):
        return splits
    return {}


def _manifest_there(root: str) -> str:
    """What is said where a list of the pictures lies in a folder that has no class folders."""
    names = [name for name in list_folder(root)[2] if name.lower().endswith((".csv", ".tsv", ".jsonl"))]
    return f"; if {printable(names[0])} lists the pictures, name that file" if names else ""


def _loose(path: str) -> list[str]:
    """How many pictures lie in a folder itself, where there are any."""
    count = len(list_folder(path)[1])
    return [f"{count} picture{'s' if count > 1 else ''}"] if count else []


def _shown(splits: Mapping[Split, Sequence[str]]) -> list[str]:
    return [f"{printable(name)}/" for names in splits.values() for name in names]


def _scan(root: str, layout: Layout, inner: tuple[Split, ...]) -> FileTable:
    """The pictures under `root`; with `inner` splits, under the first of them that each folder has."""
    paths: list[str] = []
    labels: list[str] = []
    groups: list[str] = []
    empty: list[str] = []
    spelled: tuple[list[str], list[str]] = [], []  # the names of classes, and of domains, as the folders have them
    folders, loose, others = list_folder(root)
    others += loose
    for top in folders:
        part = top
        if inner:
            have = list_folder(os.path.join(root, top))[0]
            splits = splits_among(have)
            part = next((f"{top}/{splits[split][0]}" for split in inner if split in splits), "")
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
            else:
                spelled[0].append(label)
                spelled[1].append(top)
            paths += [f"{folder}/{name}" for name in names]
            labels += [label_of(label)] * len(names)
            groups += [label_of(top)] * len(names)
    warnings = one_class(spelled[0], printable(root))
    if layout == "domains":
        warnings += one_class(spelled[1], printable(root))
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
    return several([f"{counts[suffix]} {printable(suffix)}" for suffix in order], 12)


def _expected(layout: Layout) -> str:
    return "PATH/DOMAIN/CLASS/PICTURE" if layout == "domains" else "PATH/CLASS/PICTURE"
