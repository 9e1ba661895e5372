"""Examples without labels: what a pretrained model is to keep knowing."""

from __future__ import annotations

from perpetune.data.check import find_bad
from perpetune.data.examples import TableSet, View
from perpetune.data.stream import StreamOptions
from perpetune.errors import DataError, UsageError


def reference_examples(path: str, view: View, options: StreamOptions) -> tuple[TableSet, list[str]]:
    """The examples in a folder at any depth, without those that cannot be read; and a line for each of those.

    Raises:
        UsageError: there is no such folder, or the backbone does not take pictures.
        DataError: there is no picture, none can be read, or too many are bad.
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
