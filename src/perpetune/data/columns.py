"""Read labels and groups from named columns of manifests and arrow tables."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Literal

from perpetune.data.names import printable, several
from perpetune.data.sources import LONGEST
from perpetune.errors import DataError, UsageError
from perpetune.plain import parse_json

Split = Literal["train", "test", "validation"]

SPLITS: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "eval": "validation",
}


_LEADING = re.compile(r"[^\W\d_]+")  # the first word of `train_1` and `train-00000-of-00002`


def split_named(name: str) -> Split | None:
    """The split that a name stands for, in upper or lower case; None where it stands for none."""
    return SPLITS.get(name.strip().lower())


def split_begun(name: str) -> Split | None:
    """The split that the first word of a file's name stands for; None where it stands for none."""
    word = _LEADING.match(name.lower())
    if word is None:
        return None
    begun = next((SPLITS[name] for name in ("train", "test", "val") if word[0].startswith(name)), None)
    return SPLITS.get(word[0], begun)


def splits_among(names: Iterable[str]) -> dict[Split, list[str]]:
    """Those of `names` that stand for a split, by split and in the order of `SPLITS`."""
    order = list(SPLITS)
    found: dict[Split, list[str]] = {}
    for name in sorted((n for n in names if split_named(n)), key=lambda n: order.index(n.strip().lower())):
        found.setdefault(SPLITS[name.strip().lower()], []).append(name)
    return found


def split_of(value: Any, at: str) -> Split:
    """The split that a cell names; DataError if it names no split."""
    name = str(value or "").strip().lower()
    if name not in SPLITS:
        raise DataError(f"{at}: split '{printable(name)[:60]}' is not one of train, test, val")
    return SPLITS[name]


_PATHS = ("file_name", "filename", "file", "filepath", "image_path", "image", "img", "picture", "pic")
_LABELS = ("class", "category", "target", "fine_label", "labels", "cls", "class_name", "y")


def missing_column(found: Collection[str], column: str, option: str, where: str) -> DataError:
    """The error that a column is not there; it says which option names another, and which may be meant."""
    likely = _LABELS if "label" in option else _PATHS
    alike = [name for name in found if name.strip().lower() == column.lower()]
    other = next(iter([*alike, *(name for name in found if name.strip().lower() in likely)]), "COLUMN")
    texts = [name for name in ("prompt", "messages") if name in found]
    more = f"; a column {texts[0]} is of texts, and these are read as pictures" if texts and other == "COLUMN" else ""
    return DataError(
        f"{where}: no column '{column}'; found: {_columns(found)}; "
        f"another one is named with data.{option} or --set {option}={printable(other)}{more}"
    )


def unused_columns(found: Iterable[str], used: Collection[str | None], where: str) -> list[str]:
    """A line that names the columns that nothing is learned from; none where there are none."""
    left = [name for name in found if name not in used]
    return [f"{where}: columns that are not used: {_columns(left)}"] if left else []


def _columns(names: Collection[str]) -> str:
    """Names of columns in a message, long ones cut."""
    plain = [printable(name[:80]) + ("…" if len(name) > 80 else "") for name in names]
    return several([name or "(no name)" for name in plain], 20)


def group_column(columns: Collection[str], asked: str | None, where: str, option: str = "group_column") -> str | None:
    """The column with the task or domain: the column `asked`, else `task` or `domain` if there is one.

    Raises:
        DataError: the column `asked` does not exist.
        UsageError: there are both `task` and `domain`.
    """
    if asked is not None:
        if asked not in columns:
            raise DataError(f"{where}: no column '{asked}'; found: {several(columns, 20)}")
        return asked
    present = [name for name in ("task", "domain") if name in columns]
    if len(present) > 1:
        raise UsageError(f"{where} has a column task and a column domain; set {option} to one of them")
    return present[0] if present else None


def class_names(schema: Any, column: str) -> list[str] | None:
    """The names of a `ClassLabel` column, from the Hugging Face metadata of an arrow schema; None if there are none."""
    try:
        features = parse_json((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return [str(name) for name in features[column]["names"]]
    except (KeyError, TypeError, ValueError):
        return None


def named(values: Sequence[Any], names: Sequence[str] | None, column: str, where: str) -> list[str]:
    """The cells of a label or group column as text, as they are spelled. A missing cell gives `""`.

    Args:
        names: the names that whole numbers stand for; None keeps whole numbers.

    Raises:
        DataError: a cell has another type, or its number has no name in `names`.
    """
    known: dict[Any, str] = {None: ""}
    for row, value in enumerate(values):
        at = f"{where} row {row}: column '{column}'"
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | str)):
            raise DataError(f"{at} holds {type(value).__name__}; expected text or a whole number")
        if value in known:
            continue
        if isinstance(value, str) and len(value) > LONGEST:
            raise DataError(f"{at} holds {len(value)} characters; at most {LONGEST} are a name")
        if isinstance(value, int) and names is not None and not 0 <= value < len(names):
            raise DataError(f"{at} is {value}; there are {len(names)} class names")
        known[value] = names[value] if isinstance(value, int) and names is not None else str(value)
    return [known[value] for value in values]
