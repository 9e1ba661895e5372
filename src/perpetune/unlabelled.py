"""Examples whose labels nobody looks at, from all that people keep examples in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from perpetune.data.examples import TableSet, View
from perpetune.data.names import natural, printable
from perpetune.errors import DataError, UsageError
from perpetune.sequence import origin_of, source_of
from perpetune.tasks import Batch, Item


class Unlabelled(ABC):
    """Examples by number, from 0."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batch(self, rows: Sequence[int], unreadable: list[str] | None) -> tuple[list[str], Batch | None]:
        """The names of some examples and the examples as one batch; None if none can be read.

        Args:
            unreadable: a list that gets one line for each example that cannot be read.

        Raises:
            DataError: one cannot be read, and there is no such list.
        """


class Given(Unlabelled):
    """What a call of `predict` or `answer` would take."""

    def __init__(self, given: Any, view: View):
        self.given, self.view = given, view

    def __len__(self) -> int:
        return len(self.given)

    def batch(self, rows: Sequence[int], unreadable: list[str] | None) -> tuple[list[str], Batch | None]:
        whole = self.given[rows] if isinstance(self.given, Tensor) else [self.given[row] for row in rows]
        asked = self.view.ask(whole, first=rows[0], unreadable=unreadable)
        items = [(question.item, 0, number) for number, question in enumerate(asked)]
        return [str(question.given) for question in asked], self.view.collate(items) if items else None


class Rows(Unlabelled):
    """All examples of tables, whatever split they are in."""

    def __init__(self, parts: Sequence[TableSet]):
        self.places = [(part, row) for part in parts for row in range(len(part))]

    def __len__(self) -> int:
        return len(self.places)

    def batch(self, rows: Sequence[int], unreadable: list[str] | None) -> tuple[list[str], Batch | None]:
        names, items = list[str](), list[Item]()
        for part, row in (self.places[number] for number in rows):
            try:
                items.append((part.load(row, None), 0, len(items)))
            except DataError as error:
                if unreadable is None:
                    raise
                unreadable.append(str(error))
                continue
            names.append(part.name(row))
        return names, self.places[rows[0]][0].collate(items) if items else None


def unlabelled(
    data: str | Path | Sequence[Any] | Tensor,
    view: View,
    note: Callable[[str], None],
    options: Mapping[str, Any] | None = None,
) -> Unlabelled:
    """The examples that are meant.

    Args:
        data: pictures, prompts, a path of them, or whatever `update --data` takes; labels are not looked at.
        view: says how they are read.
        note: is told what is left out.
        options: further keys of the data section for a path, as in `Learner.learn`.

    Raises:
        UsageError, DataError: nothing of this kind is there.
    """
    if not isinstance(data, str | Path):
        if options:
            raise UsageError("options need data that are a path or an id")
        return Given(data, view)
    path = str(data)
    if not options and view.plain(path):
        return Given(view.typed([path]), view)
    source = source_of(origin_of(path, view.takes, options)).without_labels()
    if source.gives != view.takes:
        raise UsageError(f"data: these are {source.gives}, but the backbone takes {view.takes}")
    tables = [table for table in (source.train(), source.validation(), source.test()) if table is not None]
    for line in dict.fromkeys(line for table in tables for line in table.warnings):
        note(line)
    note(f"labels, answers and captions in {printable(path)} are not looked at")
    parts = []
    for table in tables:
        rows = range(len(table))
        parts.append(view.examples(table, rows, natural(table.classes(rows)), "test"))
    return Rows(parts)
