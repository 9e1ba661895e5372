"""Pictures in Hugging Face `datasets`, from the hub or from a folder that `save_to_disk` wrote."""

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
    """A data set with a column of pictures (feature `Image`) and a column of labels.

    Args:
        path: the id on the hub, such as `uoft-cs/cifar100`, or a folder that `save_to_disk` wrote.
        subset: the configuration, for data sets with several.
        revision: the branch, tag or commit on the hub.
        train, test: the names of the splits; default for the test: the first of test, validation, valid and val that
            exists.
        image_column, label_column: the names of the columns.
        group_column: the column with the task or domain; default: the column `task` or `domain`, if there is one.
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
                raise DataError(f"{self._here}: the recipe names split '{self.train_split}' for both train and test")
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
                loaded = datasets.load_from_disk(self.path)
            else:
                loaded = datasets.load_dataset(self.path, self.subset, revision=self.revision)
        except (OSError, ValueError, RuntimeError) as error:  # errors of datasets and of the hub's client
            reason = printable((str(error).splitlines() or [type(error).__name__])[0])
            raise DataError(f"data set {self._here}: {reason}") from error
        return dict(loaded) if isinstance(loaded, dict) else {self.train_split: loaded}
