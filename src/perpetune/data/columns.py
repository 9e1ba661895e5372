"""Read labels and groups from named columns of manifests and arrow tables."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any, Literal

from perpetune.data.names import label_of, printable, several
from perpetune.errors import DataError, UsageError

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
    """The split that a cell names; DataError if it names no split."""
    name = str(value or "").strip().lower()
    if name not in SPLITS:
        raise DataError(f"{at}: split '{printable(name)}' is not one of train, test, val")
    return SPLITS[name]


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
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return [str(name) for name in features[column]["names"]]
    except (KeyError, TypeError, ValueError):
        return None


def named(values: Sequence[Any], names: Sequence[str] | None, column: str, where: str) -> list[str]:
    """The cells of a label or group column as text. A missing cell gives `""`.

    Args:
        names: the names that whole numbers stand for; None keeps whole numbers.

    Raises:
        DataError: a cell has another type, or its number has no name in `names`.
    """
    known: dict[Any, str] = {None: ""}
    for row, value in enumerate(values):
        if value in known:
            continue
        at = f"{where} row {row}: column '{column}'"
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise DataError(f"{at} holds {type(value).__name__}; expected text or a whole number")
        if isinstance(value, int) and names is not None and not 0 <= value < len(names):
            raise DataError(f"{at} is {value}; there are {len(names)} class names")
        known[value] = label_of(names[value] if isinstance(value, int) and names is not None else str(value))
    return [known[value] for value in values]
