"""Pictures without labels: what a pretrained model is to keep knowing."""

from __future__ import annotations

from perpetune.data.check import find_bad
from perpetune.data.pictures import picture_files
from perpetune.data.sources import FileTable
from perpetune.data.stream import StreamOptions
from perpetune.data.tasks import ImageSet
from perpetune.errors import DataError, UsageError
from perpetune.models.preprocess import Preprocess


def reference_pictures(path: str, view: Preprocess, options: StreamOptions) -> tuple[ImageSet, list[str]]:
    """The pictures in a folder at any depth, those that cannot be read left out; and a line for each of those.

    Raises:
        UsageError: there is no such folder.
        DataError: there is no picture, none can be read, or too many are bad.
    """
    try:
        files = [str(file) for file in picture_files([path])]
    except (UsageError, DataError) as error:
        raise type(error)(f"protect.reference: {error}") from None
    table = FileTable("", files, [""] * len(files))
    (bad,) = find_bad([(table, range(len(files)))], options.check, options.max_bad, "protect.reference")
    rows = [row for row in range(len(files)) if row not in bad]
    if not rows:
        raise DataError(f"protect.reference: no picture in {path} can be read")
    return ImageSet(table, rows, [""], view), list(bad.values())
