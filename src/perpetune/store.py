"""Tensors that are stored once, however many tasks have them.

The safetensors files of a task are cut into pieces: the header, each tensor, and parts of large tensors. A piece has
the name of its SHA-256. The task's folder holds two files for all of them:

  tensors.json       each file as its pieces in order, and for each piece the number of the task whose pack holds it
  pack.safetensors   the pieces that the task before did not have, as tensors of bytes; absent if there are none

So a reference points to an earlier task only, and dropping tasks from the end breaks none. A piece is compared with its
SHA-256 when it is read. A task has a piece of an earlier one only if every task between has it, because what a commit
compares is the task before.

A set of pets at rest does not change any more, so it is not compared again: one file of the task that brings it holds
the set, `rest-NAME.safetensors`, and is one piece in the pack of that task. The list of all sets at rest, with the task
and the hash of each, is a file in pieces too (`at-rest.txt`): new lines come to its end, so a task stores little of it,
and a set is found without a look at what else its task has.

What grows at its end has parts whose sizes are powers of two, the largest first. So a task that adds to it stores its
last parts anew and not the whole: on average, as many bytes as are new, times the logarithm of how many there are.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from perpetune.documents import Tensors, read_document
from perpetune.errors import StateError

INDEX = re.compile(r"tensors(\.\d+)?\.json")
PACK = re.compile(r"pack(\.\d+)?\.safetensors")
RESTING = re.compile(r"rest-([\w-]+)\.safetensors")
AT_REST = "at-rest.txt"
"""The list of all sets at rest: of each its name, the number of the task that stores it, its bytes and its SHA-256."""
LINES = re.compile(r"(?:[\w-]+ [0-9]{1,9} [0-9]{1,16} (?:[0-9a-f]{64}|-)\n)*")
LARGE = 2**20
"""Most bytes of a part of a tensor."""
LEAST = 2**12
"""Fewest bytes of a part, but for the last one."""
SMALL = 512
"""Tensors of fewer bytes stand together in one piece, for an entry of the index has about 80 bytes itself."""


class Piece(NamedTuple):
    """Bytes that are stored once: their hash, their number, and the number of the task whose pack holds them."""

    sha256: str
    size: int
    task: int


class Held(NamedTuple):
    """One file of a task: its size, and its pieces in order; None once it was pruned."""

    size: int
    pieces: tuple[Piece, ...] | None


class Rest(NamedTuple):
    """A set at rest: the number of the task that stores it, the bytes of its file, and their SHA-256; that is empty for
    a set of an older version, whose pieces stand in the index of its task."""

    task: int
    size: int
    sha256: str

    @property
    def piece(self) -> Piece:
        """Its file, as one piece."""
        return Piece(self.sha256, self.size, self.task)


class Resting(NamedTuple):
    """How many bytes the sets at rest have that a task needs: all, and those that other tasks store."""

    bytes: int
    elsewhere: int

    @classmethod
    def of(cls, rest: Mapping[str, Rest], task: int) -> Resting:
        """Of the task with that number."""
        sizes = [(one.size, one.task) for one in rest.values()]
        return cls(sum(size for size, _ in sizes), sum(size for size, at in sizes if at != task))


NOTHING = Resting(0, 0)


class Index(dict[str, Held]):
    """The files of a task whose tensors are stored once, by name.

    Args:
        resting: the bytes of the sets at rest that the task has.
        rest: these sets by name, where an older version has put the list into the index.
    """

    def __init__(
        self,
        files: Mapping[str, Held] = MappingProxyType({}),
        resting: Resting = NOTHING,
        rest: Mapping[str, Rest] = MappingProxyType({}),
    ):
        super().__init__(files)
        self.resting, self.rest = resting, rest


class Holder(Protocol):
    """A committed task, as far as its pack is asked for."""

    @property
    def cure(self) -> str:
        """What the user can do about a damaged folder."""
        ...

    def pack(self) -> str | None:
        """The path of its pack; None if it has none."""
        ...


def rest_file(name: str) -> str:
    """The file of a set at rest."""
    return f"rest-{name}.safetensors"


def pieces_of(index: Index, *, rest: bool = False) -> set[Piece]:
    """All pieces of a task's files; with `rest` those of sets at rest that its own pack holds, otherwise the others."""
    files = (held for name, held in index.items() if (RESTING.fullmatch(name) is not None) == rest)
    return {piece for held in files for piece in held.pieces or ()}


def cut(content: bytes) -> list[memoryview]:
    """The pieces of a safetensors file, in order."""
    view, size = memoryview(content), 8 + int.from_bytes(content[:8], "little")
    entries = json.loads(content[8:size])
    ends = sorted({size + e["data_offsets"][1] for name, e in entries.items() if name != "__metadata__"} - {size})
    pieces, start, before = [view[:size]], size, size
    for end in ends:
        alone = end - before >= SMALL
        if start < before and (alone or end - start > LARGE):
            pieces.append(view[start:before])
            start = before
        if alone:
            pieces += parts(view[start:end])
            start = end
        before = end
    return [*pieces, view[start:before]] if start < before else pieces


def parts(view: memoryview) -> list[memoryview]:
    """The parts of what may grow at its end: of `LARGE` bytes, then of smaller and smaller powers of two, then what
    is left."""
    found, start, size = [], 0, LARGE
    while len(view) - start >= LEAST:
        while size > len(view) - start:
            size //= 2
        found.append(view[start : start + size])
        start += size
    return [*found, view[start:]] if start < len(view) else found


def pack(
    files: Mapping[str, bytes],
    task: int,
    earlier: Index,
    holder: Callable[[int], Holder],
    rest: Mapping[str, Rest] = MappingProxyType({}),
) -> tuple[bytes, bytes | None, dict[str, Rest]]:
    """Store safetensors files of a task.

    A piece of the task before is referred to only after its bytes have been read and found to be the same. So what a
    commit stores can be read, whatever has happened to earlier folders.

    Args:
        files: their contents.
        task: the number of the task.
        earlier: the files of the task before; empty if nothing is to be shared.
        holder: gives the earlier task of a number.
        rest: the sets at rest that earlier tasks store.

    Returns:
        The contents of `tensors.json` and of the pack; None if every piece is held already. And all sets at rest: those
        of before, and those in `files`.
    """
    pieces = {name: _hashed(_cut(name, content)) for name, content in files.items()}
    brought = {match[1]: name for name in files if (match := RESTING.fullmatch(name))}
    all_rest = {**rest, **{of: Rest(task, len(files[name]), pieces[name][0][0]) for of, name in brought.items()}}
    if all_rest:
        files = {**files, AT_REST: rest_bytes(all_rest)}
        pieces[AT_REST] = _hashed(parts(memoryview(files[AT_REST])))
    contents = {digest: view for found in pieces.values() for digest, view in found}
    known = _still_held([p for p in pieces_of(earlier) if p.sha256 in contents], contents, holder)
    index, new = Index(resting=Resting.of(all_rest, task)), dict[str, memoryview]()
    for name, found in pieces.items():
        shared = {} if RESTING.fullmatch(name) else known
        index[name] = Held(len(files[name]), tuple(shared.get(d) or Piece(d, len(view), task) for d, view in found))
        new |= {digest: view for digest, view in found if digest not in shared}
    return index_bytes(index), pack_bytes(new), all_rest


def _cut(name: str, content: bytes) -> list[memoryview]:
    return [memoryview(content)] if RESTING.fullmatch(name) else cut(content)


def _hashed(views: Sequence[memoryview]) -> list[tuple[str, memoryview]]:
    return [(hashlib.sha256(view).hexdigest(), view) for view in views]


def rest_bytes(rest: Mapping[str, Rest]) -> bytes:
    """The content of `at-rest.txt`: in the order in which tasks have brought the sets, so that new lines come last."""
    lines = sorted((one.task, name, one.size, one.sha256 or "-") for name, one in rest.items())
    return "".join(f"{name} {task} {size} {digest}\n" for task, name, size, digest in lines).encode()


def parse_rest(content: bytes, task: int, where: str, cure: str) -> dict[str, Rest]:
    """The sets at rest in an `at-rest.txt`, by name. The arguments are those of `parse_index`.

    Raises:
        StateError: it is not what a commit writes.
    """
    text = content.decode(errors="replace")
    fields = text.split()
    names = fields[::4]
    if LINES.fullmatch(text) is None or len(set(names)) < len(names):
        raise StateError(f"{where}, {AT_REST}{_fault_in(text)}: {cure}")
    digests = ["" if digest == "-" else digest for digest in fields[3::4]]
    rest = dict(zip(names, map(Rest, map(int, fields[1::4]), map(int, fields[2::4]), digests), strict=True))
    _check_tasks(rest, task, where, cure)
    return rest


def _fault_in(text: str) -> str:
    """Where a list of sets at rest is wrong, and what is."""
    *lines, last = text.split("\n")
    seen: set[str] = set()
    for number, line in enumerate(lines, 1):
        if LINES.fullmatch(f"{line}\n") is None:
            return f", line {number}: no name, task, bytes and hash of a set at rest"
        name = line.partition(" ")[0]
        if name in seen:
            return f", line {number}: a set that was named before"
        seen.add(name)
    return f": its last line is not whole ({last[:20]})"


def _check_tasks(rest: Mapping[str, Rest], task: int, where: str, cure: str) -> None:
    if any(one.task > task for one in rest.values()):
        raise StateError(f"{where}: a set at rest is said to lie in a task after task {task}: {cure}")


def _still_held(
    pieces: Iterable[Piece], contents: Mapping[str, memoryview], holder: Callable[[int], Holder]
) -> dict[str, Piece]:
    """Those of the pieces whose packs hold the same bytes still, by their hash."""
    found: dict[str, Piece] = {}
    for task, wanted in _by_task(pieces).items():
        with contextlib.suppress(StateError), opened(holder(task)) as held:  # damage is for those who read that task
            found |= {p.sha256: p for p in wanted if held.equals(p, contents[p.sha256])}
    return found


def pack_bytes(pieces: Mapping[str, Any]) -> bytes | None:
    """The content of a pack, from bytes by their hash; None if there are none."""
    return save({digest: np.frombuffer(piece, np.uint8) for digest, piece in pieces.items()}) if pieces else None


def index_bytes(index: Index) -> bytes:
    """The content of `tensors.json`: one line for each file, because indented it would be half spaces."""
    lines = []
    for name, held in index.items():
        entry: dict[str, Any] = {"bytes": held.size}
        if held.pieces is not None:
            digests, sizes, tasks = zip(*held.pieces, strict=True) if held.pieces else ((), (), ())
            entry["pieces"] = {"sha256": digests, "bytes": sizes, "task": tasks}
        lines.append(f"{json.dumps(name)}: {json.dumps(entry, separators=(',', ':'))}")
    told = json.dumps(index.resting._asdict(), separators=(",", ":"))
    rest = f',\n"at_rest": {told}' if index.resting.bytes else ""
    return ('{"files": {\n' + ",\n".join(lines) + "\n}" + rest + "}\n").encode()


def parse_index(content: bytes, task: int, where: str, cure: str) -> Index:
    """The files in a `tensors.json`.

    Args:
        task: the number of its task.
        where: names the file.
        cure: what the user can do.

    Raises:
        StateError: it is not what a commit writes.
    """
    document = read_document(Tensors, content, where, cure)
    rest = {name: Rest(at, size, "") for name, (at, size) in document.get("rest", {}).items()}
    _check_tasks(rest, task, where, cure)
    told = document.get("at_rest")
    index = Index(
        resting=Resting.of(rest, task) if told is None else Resting(told["bytes"], told["elsewhere"]), rest=rest
    )
    for name, entry in document["files"].items():
        found = entry.get("pieces")
        pieces = None if found is None else tuple(map(Piece, found["sha256"], found["bytes"], found["task"]))
        if any(piece.task > task for piece in pieces or ()):
            raise StateError(f"{where}: {name} refers to a task after task {task}: {cure}")
        index[name] = Held(entry["bytes"], pieces)
    return index


def assemble(index: Index, names: Collection[str], holder: Callable[[int], Holder]) -> dict[str, bytes]:
    """The contents of some files of a task, by name.

    Raises:
        StateError: a pack is missing, torn, changed or another one; the message names it.
    """
    files = {}
    for name in names:
        pieces = index[name].pieces
        assert pieces is not None
        found: dict[Piece, NDArray[np.uint8]] = {}
        for task, wanted in _by_task(set(pieces)).items():
            with opened(holder(task)) as held:
                found |= {piece: held.read(piece) for piece in wanted}
        files[name] = b"".join(found[piece].data for piece in pieces)
    return files


def whole(files: Mapping[str, Piece], holder: Holder) -> dict[str, bytes]:
    """The contents of files by name, each of which is one piece of one pack.

    Raises:
        StateError: the pack is missing, torn, changed or another one; the message names it.
    """
    with opened(holder) as held:
        return {name: held.read(piece).tobytes() for name, piece in files.items()}


def _by_task(pieces: Iterable[Piece]) -> dict[int, list[Piece]]:
    found: dict[int, list[Piece]] = {}
    for piece in pieces:
        found.setdefault(piece.task, []).append(piece)
    return found


class Pack:
    """The pieces in an open pack."""

    def __init__(self, path: str, file: Any, holder: Holder):
        self.path, self._file, self._holder = path, file, holder
        self._names = set(file.keys())

    def sizes(self) -> dict[str, int]:
        """The size of each piece, by its hash."""
        return {name: int(np.prod(self._file.get_slice(name).get_shape())) for name in self._names}

    def read(self, piece: Piece) -> NDArray[np.uint8]:
        """A piece; StateError if it is not there or was changed."""
        found = self._get(piece)
        if found is None or hashlib.sha256(found.data).hexdigest() != piece.sha256:
            fault = "does not hold" if found is None else "holds other bytes as"
            raise StateError(
                f"{self.path} is torn or was changed (it {fault} the piece {piece.sha256[:12]}, which tensors.json "
                f"refers to): {self._holder.cure}"
            )
        return found

    def equals(self, piece: Piece, content: memoryview) -> bool:
        """Whether a piece is there and has these bytes."""
        found = self._get(piece)
        return found is not None and np.array_equal(found, np.frombuffer(content, np.uint8))

    def _get(self, piece: Piece) -> NDArray[np.uint8] | None:
        if piece.sha256 not in self._names or self._file.get_slice(piece.sha256).get_dtype() != "U8":
            return None
        found: NDArray[np.uint8] = self._file.get_tensor(piece.sha256)
        return found if found.shape == (piece.size,) else None


@contextlib.contextmanager
def opened(holder: Holder) -> Iterator[Pack]:
    """The pack of a committed task.

    Raises:
        StateError: it has none, or it is missing or torn.
    """
    path = holder.pack()
    if path is None:
        raise StateError(f"{holder} holds no tensors any more, and a later task needs them: {holder.cure}")
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError(0, "it is not a regular file")
        file = safe_open(path, framework="numpy")
    except OSError as error:
        reason = error.strerror or ("No such file or directory" if isinstance(error, FileNotFoundError) else str(error))
        raise StateError(f"{path} cannot be read ({reason}): {holder.cure}") from None
    except SafetensorError as error:
        raise StateError(f"{path} is torn or was changed ({error}): {holder.cure}") from None
    with file as entered:
        yield Pack(path, entered, holder)
