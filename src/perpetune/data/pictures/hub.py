"""Pictures in Hugging Face `datasets`, from the hub or from a folder that `save_to_disk` wrote."""

from __future__ import annotations

import os
import re
from functools import cached_property
from typing import Any

from perpetune.data.columns import group_column, splits_among, unused_columns
from perpetune.data.names import printable, several
from perpetune.data.pictures.arrow import ArrowTable, Columns, arrow_table
from perpetune.data.sources import Fit, Kind, Source
from perpetune.errors import DataError, MissingExtra

_FILES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".txt", ".zip", ".gz", ".tar", ".tgz", ".xlsx")


class HubSource(Source):
    """A data set with a column of pictures (feature `Image`) and a column of labels.

    Args:
        path: its id on the hub, such as `uoft-cs/cifar100`, or a folder that `save_to_disk` wrote.
        subset: the configuration, for data sets that have several.
        revision: branch, tag or commit on the hub.
        train, test: names of the splits; a split `Train` or `training` counts as `train` where there is none of that
            name. Default for the test: the split whose name stands for a test, else for validation.
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
            single = all(os.path.exists(os.path.join(path, name)) for name in ("dataset_info.json", "state.json"))
            return Fit.MARK if single or os.path.exists(os.path.join(path, "dataset_dict.json")) else Fit.NO
        owner, slash, name = path.partition("/")
        is_id = slash and all(re.fullmatch(r"[\w-][\w.-]*", part) for part in (owner, name))
        missing = os.path.isdir(owner) or name.lower().endswith(_FILES)  # a path that is not there, and no id
        return Fit.ANY if is_id and not missing and not os.path.exists(path) else Fit.NO

    def train(self) -> ArrowTable:
        table = self._table(self._train_name)
        found = self._splits[self._train_name].column_names
        used = (self.columns.image, self.columns.label, group_column(found, self.columns.group, self._here))
        table.warnings += unused_columns(found, used, self._here)
        unused = [name for name in self._splits if name not in (self._train_name, self._test_name)]
        if unused:
            table.warnings.append(f"{self._here}: splits that are not used: {several(unused)}")
        return table

    def test(self) -> ArrowTable | None:
        if self.test_split is not None:
            if self.test_split == self.train_split:
                raise DataError(f"{self._here}: the recipe names split '{self.train_split}' for both train and test")
            return self._table(self.test_split)
        return None if self._test_name is None else self._table(self._test_name)

    @property
    def _train_name(self) -> str:
        """The split to learn from: the one asked for, or the one whose name stands for training."""
        if self.train_split in self._splits:
            return self.train_split
        others = splits_among(self._splits).get("train", []) if self.train_split == "train" else []
        return others[0] if len(others) == 1 else self.train_split

    @property
    def _test_name(self) -> str | None:
        """The split to test on, None where there is none."""
        if self.test_split is not None:
            return self.test_split
        among = splits_among(name for name in self._splits if name != self._train_name)
        return next((among[kind][0] for kind in ("test", "validation") if kind in among), None)

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
            if os.path.isdir(self.path):
                raise MissingExtra("data: hf", "data") from None
            raise MissingExtra(f"{self._here}: no such file or folder; to ask the Hugging Face hub", "data") from None
        try:
            if os.path.isdir(self.path):
                found = datasets.load_from_disk(self.path)
            else:
                found = datasets.load_dataset(self.path, self.subset, revision=self.revision)
        except (OSError, ValueError, RuntimeError) as error:  # errors of datasets and of the hub's client
            reason = printable((str(error).splitlines() or [type(error).__name__])[0])
            if os.path.isdir(self.path):
                raise DataError(f"data set {self._here}: {reason}") from error
            raise DataError(
                f"data set {self._here}: no such file or folder, and from the Hugging Face hub: {reason}"
            ) from error
        return dict(found) if isinstance(found, dict) else {self.train_split: found}
