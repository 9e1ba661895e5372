"""Labels and groups out of named columns, as manifests and arrow tables have them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal

from perpetune.data.names import label_of, printable, several
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


def split_of(value: Any, at: str) -> Split:
    """The split that a cell names; DataError where it names none."""
    name = str(value or "").strip().lower()
    if name not in SPLITS:
        raise DataError(f"{at}: split '{printable(name)[:60]}' is not one of train, test, val")
    return SPLITS[name]


def group_column(columns: Collection[str], asked: str | None, where: str, option: str = "group_column") -> str | None:
    """The column with the task or domain: the one asked for, else `task` or `domain`, whichever is there."""
    if asked is not None:
        if asked not in columns:
            raise DataError(f"{where}: no column '{asked}'; found: {several(columns, 20)}")
        return asked
    there = [name for name in ("task", "domain") if name in columns]
    if len(there) > 1:
        raise UsageError(f"{where}: has a column task and a column domain; set {option} to one of them")
    return there[0] if there else None


def class_names(schema: Any, column: str) -> list[str] | None:
    """Names of a `ClassLabel` column from the Hugging Face metadata of an arrow schema; None without."""
    try:
        features = parse_json((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return [str(name) for name in features[column]["names"]]
    except (KeyError, TypeError, ValueError):
        return None


def named(values: Sequence[Any], names: Sequence[str] | None, column: str, where: str) -> list[str]:
    """A label or group column as text: positions in `names` by name, other whole numbers as they are.

    A missing cell is `""`.

    Raises:
        DataError: a cell of another type, or a position outside `names`.
    """
    known: dict[Any, str] = {None: ""}
    for row, value in enumerate(values):
        at = f"{where} row {row}: column '{column}'"
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | str)):
            raise DataError(f"{at} holds {type(value).__name__}; expected text or a whole number")
        if value in known:
            continue
        if isinstance(value, int) and names is not None and not 0 <= value < len(names):
            raise DataError(f"{at} is {value}; there are {len(names)} class names")
        known[value] = label_of(names[value] if isinstance(value, int) and names is not None else str(value))
    return [known[value] for value in values]
