"""Pictures without labels: what a pretrained model is to keep knowing."""

from __future__ import annotations

from perpetune.data.check import find_bad
from perpetune.data.pictures import picture_files
from perpetune.data.sources import FileTable
from perpetune.data.stream import StreamOptions
from perpetune.data.tasks import ImageSet, View
from perpetune.errors import DataError, UsageError
from perpetune.models.preprocess import Preprocess


def reference_pictures(path: str, view: View, options: StreamOptions) -> tuple[ImageSet, list[str]]:
    """The pictures in a folder at any depth, those that cannot be read left out; and a line for each of those.

    Raises:
        UsageError: there is no such folder, or the backbone does not take pictures.
        DataError: there is no picture, none can be read, or too many are bad.
    """
    if not isinstance(view, Preprocess):
        raise UsageError(f"protect.reference: a folder of pictures, and the backbone takes {view.takes}")
    try:
        files = [str(file) for file in picture_files([path])]
    except (UsageError, DataError) as error:
        raise type(error)(f"protect.reference: {error}") from None
    whole = ImageSet(FileTable("", files, [""] * len(files)), range(len(files)), [""], view)
    (bad,) = find_bad([whole], options.check, options.max_bad, "protect.reference")
    pictures = whole.within([""], bad)
    if not len(pictures):
        raise DataError(f"protect.reference: no picture in {path} can be read")
    return pictures, list(bad.values())
