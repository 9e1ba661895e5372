"""Names of files, classes and tasks: sort them as people do, shorten them, make them safe to print and for folders."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Collection, Iterable

RESERVED = "start"  # a task cannot have this name, because a rollback to `start` drops all tasks
_LONGEST = 100  # bytes of a task's name; a folder's name has at most 255, with the task's number and further endings


def natural_key(name: str) -> tuple[list[str | int], str]:
    """A sorting key that puts `img2` before `img10` and ignores case; names that differ only in case come in a fixed
    order."""
    parts = re.split(r"([0-9]+)", name)  # text and digits in turn, so that a number is compared with a number
    return [int(p) if i % 2 else p.casefold() for i, p in enumerate(parts)], name


def natural(names: Iterable[str]) -> list[str]:
    """`names` in the order of `natural_key`."""
    return sorted(names, key=natural_key)


def printable(name: str) -> str:
    """`name` on one line, with line breaks and undecodable bytes of file names as escapes."""
    if name.isprintable():
        return name
    breaks = ("Cc", "Cs", "Zl", "Zp")  # controls, undecodable bytes, line and paragraph separators
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in breaks else c for c in name)


def label_of(name: str) -> str:
    """The class that a folder or a cell names. It is the same on systems that store accents in different ways."""
    return printable(unicodedata.normalize("NFC", name.strip()))


def one_class(names: Iterable[str], where: str) -> list[str]:
    """A line on `names` that are spelled in several ways and stand for one (`label_of`); none where there are none."""
    first: dict[str, str] = {}
    found = []
    for name in dict.fromkeys(names):
        other = first.setdefault(label_of(name), name)
        if other != name:
            found.append(f"{_spelled(other)} and {_spelled(name)}")
    return [f"{where}: spelled in several ways, and taken for one: {several(found)}"] if found else []


def _spelled(name: str) -> str:
    """`name` in quotes; with accents as escapes where they are stored apart from their letters."""
    return f"'{printable(name)}'" if name == unicodedata.normalize("NFC", name) else ascii(name)


def alike(names: Iterable[str], known: Iterable[str] = ()) -> list[str]:
    """`'Ant' and 'ant'` for each two names that differ only in case, width, or spaces, `_` and `-` between words.

    Args:
        names: are compared with each other and with the `known`.
        known: are not compared with each other.
    """
    first: dict[str, str] = {}
    for name in natural(known):
        first.setdefault(_plain(name), name)
    found = []
    for name in natural(names):
        other = first.setdefault(_plain(name), name)
        if other != name:
            found.append(f"'{other}' and '{name}'")
    return found


def spellings(names: Iterable[str], known: Iterable[str]) -> list[tuple[str, str]]:
    """Each of the `names` that looks like another spelling of a `known` one, with that one.

    They differ only in case, width, spaces, `_` or `-`, in an `s` or `es` at the end, or in one letter (of at least 5)
    or two (of at least 9) that is missing, too much, another one or has changed places. Names whose numbers differ are
    different.
    """
    plain = {name: _plain(name) for name in natural(known)}
    found = []
    for name in natural(names):
        here = _plain(name)
        near = [(_far(here, there), other) for other, there in plain.items()]
        near = [pair for pair in near if pair[0] is not None and pair[1] != name]
        if near:
            found.append((name, min(near)[1]))
    return found


def _far(one: str, other: str) -> int | None:
    """How many letters apart two plain names are; None if they are too far apart to be spellings of one."""
    if one == other:
        return 0
    if re.findall(r"\d+", one) != re.findall(r"\d+", other):
        return None
    short, long = sorted((one, other), key=len)
    if len(short) >= 3 and long in (f"{short}s", f"{short}es"):
        return 1
    most = 2 if len(long) >= 9 else 1 if len(long) >= 5 else 0
    apart = edits(one, other) if len(long) - len(short) <= most else most + 1
    return apart if apart <= most else None


def edits(one: str, other: str) -> int:
    """How many letters have to be put in, left out, exchanged, or swapped with their neighbour to turn one text into
    the other (Damerau 1964, as "optimal string alignment")."""
    before: list[int] = []
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        after = [i]
        for j, b in enumerate(other, 1):
            best = min(row[j] + 1, after[-1] + 1, row[j - 1] + (a != b))
            if i > 1 and j > 1 and a == other[j - 2] and one[i - 2] == b:
                best = min(best, before[j - 2] + 1)
            after.append(best)
        before, row = row, after
    return row[-1]


def _plain(name: str) -> str:
    return " ".join(re.split(r"[\s_-]+", unicodedata.normalize("NFKC", name).casefold())).strip()


def several(names: Collection[str], shown: int = 5) -> str:
    """`a, b, c, d, e and 7 more`."""
    first = ", ".join(list(names)[:shown])
    return first if len(names) <= shown else f"{first} and {len(names) - shown} more"


def safe_name(name: str) -> str:
    """`name` as the name of a folder: letters and digits of any script, `.`, `_` and `-`, at most 100 bytes of UTF-8.

    It begins with a letter or digit. It is empty if `name` has none.
    """
    plain = "".join(c if _is_safe(c) else " " for c in unicodedata.normalize("NFC", name))
    plain = "_".join(plain.split())
    plain = "".join(itertools.dropwhile(lambda c: not c.isalnum(), plain))
    return _shortened(plain, _LONGEST)


def task_names(wanted: Iterable[str], *, first: int = 1, taken: Iterable[str] = ()) -> list[str]:
    """A safe and unique name of a task for each of the `wanted` names.

    The names are unique also on file systems that ignore case. None of them is in `taken` or is `start`. If nothing of
    a name is safe, its place gives the name: `task-3` for the third one, if `first` is 1.
    """
    names: list[str] = []
    used = {name.casefold() for name in taken}
    for i, name in enumerate(wanted, first):
        stem = safe_name(name) or f"task-{i}"
        unique = stem = f"{stem}-1" if stem == RESERVED else stem
        n = 1
        while unique.casefold() in used:
            n += 1
            unique = _shortened(stem, _LONGEST - len(f"-{n}")) + f"-{n}"  # short enough to stay safe
        used.add(unique.casefold())
        names.append(unique)
    return names


def _is_safe(c: str) -> bool:
    return (
        c.isalnum() or c in "._-" or unicodedata.category(c).startswith("M")
    )  # the vowel signs of some scripts are marks


def _shortened(name: str, size: int) -> str:
    return name.encode()[:size].decode(errors="ignore").rstrip("._-")
