"""YAML and JSON that a stranger may have written, as plain values.

Size, depth and aliases are bounded before anything is built. Every fault of a parser is a `Malformed` with one line.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, DocumentStartEvent, ScalarEvent

from perpetune.errors import UsageError

MOST_YAML = 2**20
"""Bytes of a YAML text."""
MOST_JSON = 2**26
"""Bytes of a JSON document that is read as a whole."""
MOST_DEPTH = 64
"""How deep lists and mappings may stand in each other."""
MOST_NODES = 50_000
"""Values of a YAML text, each as often as aliases repeat it."""
MOST_KEYS = 1_000
"""Keys of one mapping in YAML."""
MOST_NAMES = 200_000
"""Names in one list."""
MOST_DIGITS = 64
"""Digits of a whole number."""

_BRACKET = re.compile(r'\\.|["\[\]{}]', re.DOTALL)
_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")}


class Malformed(ValueError):
    """A text is not what it should be. The message is one line; it names the line of the text where that is known.

    Args:
        what: the fault.
        line: the number of the line, from 1.
    """

    def __init__(self, what: str, line: int | None = None):
        self.what, self.line = " ".join(what.split()), line
        super().__init__(self.what if line is None else f"line {line}: {self.what}")


def read_regular(path: str | Path, most: int) -> bytes:
    """The content of a regular file.

    Raises:
        OSError: it cannot be read, is a pipe or a device, or has more than `most` bytes. `strerror` says what is wrong.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):  # asked before it is opened, for opening alone can do something
        raise _no_regular(path)
    # A pipe may have taken the file's place since; without O_NONBLOCK, opening it would wait for a writer.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    with open(os.open(path, flags), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise _no_regular(path)
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"it has more than {most} bytes", str(path))
    return content


def names_in(given: str | Sequence[str], where: str) -> list[str]:
    """The names in a list, or one on each line of a file; each once.

    Args:
        where: what the names are, for messages.

    Raises:
        UsageError: the file cannot be read, a name is empty, or there are more than `MOST_NAMES`.
    """
    if isinstance(given, str):
        try:
            text = read_regular(Path(given).expanduser(), MOST_JSON).decode("utf-8-sig")
        except (OSError, ValueError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
            raise UsageError(f"{where}: cannot read {given!r}: {reason}") from None
        given = [line.strip() for line in text.splitlines() if line.strip()]
    names = list(dict.fromkeys(given))
    if len(names) > MOST_NAMES:
        raise UsageError(f"{where} has {len(names)} names; at most {MOST_NAMES} are expected")
    if any(not name.strip() for name in names):
        raise UsageError(f"{where} has an empty name")
    return names


def _no_regular(path: str | Path) -> OSError:
    if os.path.isdir(path):
        return IsADirectoryError(errno.EISDIR, "Is a directory", str(path))
    return OSError(errno.EINVAL, "it is not a regular file (a pipe or a device)", str(path))


# -- JSON ---------------------------------------------------------------------------------------------------


def parse_json(
    text: str | bytes, *, finite: bool = False, most: int = MOST_JSON, decoder: json.JSONDecoder | None = None
) -> Any:
    """The value of a JSON text. A byte order mark before it is skipped.

    Args:
        finite: whether NaN and infinite numbers are refused.
        decoder: decodes the text; None is one of this module.
        most: the number of bytes (of a `str`: of characters) that the text may have.

    Raises:
        Malformed: not JSON, too large or too deep, a key stands twice in one object, or a number is too long.
    """
    if len(text) > most:
        raise Malformed(f"it has more than {most} bytes")
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise Malformed(f"not UTF-8 text (byte {error.start})") from None
    else:
        text = text.removeprefix("\ufeff")
    check_depth(text)
    try:
        return (decoder or (_FINITE if finite else DECODER)).decode(text)
    except Malformed:
        raise
    except RecursionError:  # not after `check_depth`, unless the caller itself is deep already
        raise Malformed(f"lists and objects stand in each other more than {MOST_DEPTH} deep") from None
    except json.JSONDecodeError as error:
        raise Malformed(str(error)) from None


def read_json(path: str | Path, *, finite: bool = False, most: int = MOST_JSON) -> Any:
    """The value that a JSON file holds.

    Raises:
        OSError: the file cannot be read, is not a regular file, or is too large.
        Malformed: as `parse_json`.
    """
    return parse_json(read_regular(path, most), finite=finite, most=most)


def read_object(path: str | Path, where: str) -> dict[str, Any]:
    """The JSON object that a configuration file holds.

    Args:
        path: of the file.
        where: the name of the file in messages.

    Raises:
        UsageError: the file cannot be read, is not JSON, or holds something else.
    """
    try:
        content = read_json(path)
    except OSError as error:
        raise UsageError(f"{where} cannot be read: {error.strerror or error}") from error
    except Malformed as error:
        raise UsageError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{where} holds a {type(content).__name__}; an object is expected")
    return content


def check_depth(text: str) -> None:
    """Malformed if lists and objects of a JSON text stand too deep in each other."""
    if text.count("[") + text.count("{") <= MOST_DEPTH:
        return
    depth, inside = 0, False
    for found in _BRACKET.finditer(text):
        sign = found[0]
        if sign == '"':
            inside = not inside
        elif not inside and sign in "[{":
            depth += 1
            if depth > MOST_DEPTH:
                line = text.count("\n", 0, found.start()) + 1
                raise Malformed(f"lists and objects stand in each other more than {MOST_DEPTH} deep", line)
        elif not inside and sign in "]}":
            depth -= 1


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise Malformed(f"key {_short(twice)} stands twice")
    return made


def _whole(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise Malformed(f"a number has {len(digits)} digits")
    return int(digits)


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")) or value != value:
        raise Malformed(f"{_short(text)} is not a finite number")
    return value


def decoder_of(parse_float: Callable[[str], Any] | None = None) -> json.JSONDecoder:
    """Decodes JSON that `check_depth` has seen; `parse_float` makes its numbers with a fraction."""
    return json.JSONDecoder(parse_int=_whole, parse_float=parse_float, object_pairs_hook=_object)


DECODER = decoder_of()
_FINITE = json.JSONDecoder(parse_int=_whole, parse_float=_finite, parse_constant=_finite, object_pairs_hook=_object)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


# -- YAML ---------------------------------------------------------------------------------------------------


def parse_yaml(text: str) -> Any:
    """The value of a YAML text of one document. Dates stay the text that they are written as.

    Raises:
        Malformed: not YAML, too large or too deep, aliases that repeat too much, a tag that makes anything but plain
            values, a key that stands twice, or a value that is not what its tag says.
    """
    if len(text) > MOST_YAML:
        raise Malformed(f"it has more than {MOST_YAML} characters")
    if _Fast is not None and not _UNLIKE.search(text):
        try:
            _check_events(text, _Fast)
            return yaml.load(text, Loader=_Fast)
        except (yaml.YAMLError, Malformed):
            pass  # for the parser in Python to say: its faults are the same everywhere, and name their line
    try:
        _check_events(text, _Loader)
        return yaml.load(text, Loader=_Loader)
    except yaml.reader.ReaderError as error:
        sign = f"the character #x{error.character:04x}" if isinstance(error.character, int) else "its encoding"
        raise Malformed(f"{sign} is not allowed", text.count("\n", 0, error.position) + 1) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        raise Malformed(getattr(error, "problem", None) or str(error), mark.line + 1 if mark else None) from None
    except RecursionError:  # not after the check, unless the caller itself is deep already
        raise Malformed(f"lists and mappings stand in each other more than {MOST_DEPTH} deep") from None


# Where the two parsers may differ: tabs, other line breaks, rare signs, directives, tags, anchors and aliases.
_UNLIKE = re.compile(r"[^\n -~\u00a0-\u2027\u202a-\ud7ff]|^%|(?:^|[\s\[\]{},:?\-])[!&*]|[|>][-+0-9]*#", re.MULTILINE)


def _check_events(text: str, loader: type) -> None:
    """Go through the text without building anything, and stop at the first thing that is too much."""
    nodes, documents = 0, 0
    open_: list[tuple[str | None, int]] = []  # of each open collection: its anchor, and the number of nodes before it
    sizes: dict[str, int] = {}  # how many nodes each anchor stands for
    for event in yaml.parse(text, Loader=loader):
        line = event.start_mark.line + 1 if event.start_mark else 1
        if isinstance(event, DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise Malformed("a second document begins; one is expected", line)
        elif isinstance(event, AliasEvent):
            if any(anchor == event.anchor for anchor, _ in open_):
                raise Malformed(f"the alias *{event.anchor} stands inside what it repeats", line)
            nodes += sizes.get(event.anchor or "", 1)  # an alias of nothing is for the parser to name
        elif isinstance(event, ScalarEvent | CollectionStartEvent):
            nodes += 1
            if event.tag is not None and event.tag != "!" and event.tag not in _TAGS:
                raise Malformed(f"the tag {_short(event.tag)} makes no plain value: leave it out", line)
            if isinstance(event, ScalarEvent):
                sizes |= {event.anchor: 1} if event.anchor else {}
            else:
                open_.append((event.anchor, nodes - 1))
                if len(open_) > MOST_DEPTH:
                    raise Malformed(f"lists and mappings stand in each other more than {MOST_DEPTH} deep", line)
        elif isinstance(event, CollectionEndEvent):
            anchor, before = open_.pop()
            sizes |= {anchor: nodes - before} if anchor else {}
        if nodes > MOST_NODES:
            raise Malformed(f"it stands for more than {MOST_NODES} values, with those that aliases repeat", line)


class _Plain(yaml.constructor.SafeConstructor):
    """Plain values only. No key stands twice, because the second would silently replace the first."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        if not isinstance(node, yaml.MappingNode):  # `!!map z`
            raise _fault("no mapping, though its tag says so", node)
        if len(node.value) > MOST_KEYS:
            raise _fault(f"a mapping of {len(node.value)} keys; at most {MOST_KEYS} are read", node)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise _fault(f"key {_short(key.value)} stands twice", key)
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        kind = node.tag.rpartition(":")[2]
        most = {"int": MOST_DIGITS, "float": 8 * MOST_DIGITS}.get(kind)
        if most and len(node.value) > most:
            raise _fault(f"a number has {len(node.value)} digits", node)
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError):
            raise _fault(f"{_short(node.value)} is no {kind}", node) from None


# Without dates: `2024-02-30` would be an error, and no key of a recipe is a date.
_RESOLVERS = {
    first: [(tag, pattern) for tag, pattern in found if not tag.endswith((":timestamp", ":value"))]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Loader(_Plain, yaml.SafeLoader):
    yaml_implicit_resolvers = _RESOLVERS


_Fast: Any = None
"""The same on libyaml, where PyYAML was built with it: a recipe of a state takes 2 ms instead of 50."""
if yaml.__with_libyaml__:

    class _CLoader(_Plain, yaml.CSafeLoader):
        yaml_implicit_resolvers = _RESOLVERS

    _Fast = _CLoader


def _fault(what: str, node: yaml.Node) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(problem=what, problem_mark=node.start_mark)
