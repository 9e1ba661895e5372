"""Names of files, classes and tasks: sorted as people do, shortened, and safe to print or to make a folder of."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Sorts `img2` before `img10` and ignores case, then tells apart names that differ only by case."""
    parts = re.split(r"([0-9]+)", name)  # text and digits in turn, so that equals are compared with equals
    return [int(p) if i % 2 else p.casefold() for i, p in enumerate(parts)], name


def natural(names: Iterable[str]) -> list[str]:
    """`names` in the order of `natural_key`."""
    return sorted(names, key=natural_key)


def printable(name: str) -> str:
    """`name` on one line and encodable: line breaks and the undecodable bytes of file names are escaped."""
    if name.isprintable():
        return name
    breaks = ("Cc", "Cs", "Zl", "Zp")  # controls, undecodable bytes, line and paragraph separators
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in breaks else c for c in name)


def label_of(name: str) -> str:
    """The class that a folder or a cell names; systems that store accents differently agree on it."""
    return printable(unicodedata.normalize("NFC", name.strip()))


def several(names: Collection[str], shown: int = 5) -> str:
    """`a, b, c, d, e and 7 more`."""
    first = ", ".join(list(names)[:shown])
    return first if len(names) <= shown else f"{first} and {len(names) - shown} more"


def safe_name(name: str) -> str:
    """`name` as a folder name of letters, digits, `.`, `_` and `-`; empty when no letter or digit is left."""
    plain = unicodedata.normalize("NFKD", name)
    plain = "".join(c for c in plain if not unicodedata.combining(c))
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", plain).strip("._-")[:60]
    return plain if re.search(r"[A-Za-z0-9]", plain) else ""


def task_names(wanted: Iterable[str]) -> list[str]:
    """Safe and unique, also on file systems that ignore case; `task-3` for the third where nothing safe is left."""
    names: list[str] = []
    taken: set[str] = set()
    for i, name in enumerate(wanted, 1):
        stem = safe_name(name) or f"task-{i}"
        unique, n = stem, 1
        while unique.casefold() in taken:
            n += 1
            unique = f"{stem}-{n}"
        taken.add(unique.casefold())
        names.append(unique)
    return names
