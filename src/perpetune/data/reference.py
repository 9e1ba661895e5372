"""Reference examples without labels. They stand for the knowledge that a pretrained model must keep."""

from __future__ import annotations

from perpetune.data.check import find_bad
from perpetune.data.examples import TableSet, View
from perpetune.data.stream import StreamOptions
from perpetune.errors import DataError, UsageError


def reference_examples(path: str, view: View, options: StreamOptions) -> tuple[TableSet, list[str]]:
    """The readable examples in a folder and all folders inside it; and a line for each example that cannot be read.

    Raises:
        UsageError: the folder does not exist, or the backbone does not take pictures.
        DataError: there is no picture, no picture can be read, or too many are bad.
    """
    try:
        whole = view.unlabelled(path)
    except (UsageError, DataError) as error:
        raise type(error)(f"protect.reference: {error}") from None
    (bad,) = find_bad([whole], options.check, options.max_bad, "protect.reference")
    good = whole.within([""], bad)
    if not len(good):
        raise DataError(f"protect.reference: no {whole.table.noun} in {path} can be {whole.table.use}")
    return good, list(bad.values())
