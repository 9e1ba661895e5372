"""Hugging Face `datasets`, from the hub or from a folder they were saved to."""

from __future__ import annotations

import os
import re
from functools import cached_property
from typing import Any

from perpetune.data.names import printable, several
from perpetune.data.pictures.arrow import ArrowTable, Columns, arrow_table
from perpetune.data.sources import Fit, Kind, Source
from perpetune.errors import DataError, MissingExtra

_TEST = ("test", "validation", "valid", "val")


class HubSource(Source):
    """A data set with a column of pictures (feature `Image`) and one of labels.

    Args:
        path: its id on the hub, such as `uoft-cs/cifar100`, or a folder that `save_to_disk` wrote.
        subset: the configuration, for data sets that have several.
        revision: branch, tag or commit on the hub.
        train, test: names of the splits; default for the test: the first of test, validation, valid, val
            that there is.
        image_column, label_column: what the columns are called.
        group_column: the column with the task or domain; default: `task` or `domain`, whichever is there.
    """

    def __init__(
        self,
        *,
        path: str,
        subset: str | None = None,
        revision: str | None = None,
        train: str = "train",
        test: str | None = None,
        image_column: str = "image",
        label_column: str = "label",
        group_column: str | None = None,
    ):
        self.path = path
        self.subset = subset
        self.revision = revision
        self.train_split = train
        self.test_split = test
        self.columns = Columns(image_column, label_column, group_column)

    @classmethod
    def fits(cls, path: str, wanted: Kind | None = None) -> Fit:
        if os.path.isdir(path):
            saved = any(os.path.exists(os.path.join(path, name)) for name in ("dataset_dict.json", "dataset_info.json"))
            return Fit.MARK if saved else Fit.NO
        is_id = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path) is not None
        return Fit.ANY if is_id and not os.path.exists(path) else Fit.NO

    def train(self) -> ArrowTable:
        return self._table(self.train_split)

    def test(self) -> ArrowTable | None:
        if self.test_split is not None:
            if self.test_split == self.train_split:
                raise DataError(f"{self._here}: split '{self.train_split}' is named for train and for test")
            return self._table(self.test_split)
        name = next((name for name in _TEST if name in self._splits and name != self.train_split), None)
        return None if name is None else self._table(name)

    def _table(self, split: str) -> ArrowTable:
        if split not in self._splits:
            raise DataError(f"{self._here}: no split '{split}'; found: {several(list(self._splits), 20)}")
        part = self._splits[split]
        return arrow_table([(f"{self._here} {split}", part.with_format(None).data.table)], self.columns)

    @property
    def _here(self) -> str:
        return printable(self.path)

    @cached_property
    def _splits(self) -> dict[str, Any]:
        try:
            import datasets
        except ImportError:
            raise MissingExtra("data: hf", "data") from None
        try:
            if os.path.isdir(self.path):
                found = datasets.load_from_disk(self.path)
            else:
                found = datasets.load_dataset(self.path, self.subset, revision=self.revision)
        except (OSError, ValueError, RuntimeError) as error:  # what datasets and the hub's client raise
            reason = printable((str(error).splitlines() or [type(error).__name__])[0])
            raise DataError(f"data set {self._here}: {reason}") from error
        return dict(found) if isinstance(found, dict) else {self.train_split: found}
