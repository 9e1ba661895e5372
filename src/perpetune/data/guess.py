"""Which source fits what is at a path."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from typing import Any

from perpetune.data.names import printable
from perpetune.data.sources import Fit, Kind, Source
from perpetune.errors import UsageError


def guess_source(
    path: str, sources: Mapping[str, type[Source]], wanted: Kind | None = None
) -> tuple[str, dict[str, Any]]:
    """Name and options of the source that fits what is at `path`, by what each of them says of it.

    Where several are equally sure, the first of them is taken. A source without an option `path`, such as `digits`, is
    meant where its own name is given.

    Args:
        path: a file, a folder, the name of a source, or the id of a data set on the Hugging Face hub.
        sources: all there are, by name.
        wanted: the kind of data that is expected, where that is known: a file may look like either.

    Raises:
        UsageError: nothing fits.
        DataError: a folder cannot be read.
    """
    if path.lower() in sources and not os.path.isdir(path) and not _has_path(sources[path.lower()]):
        return path.lower(), {}
    fits = {name: source.fits(path, wanted) for name, source in sources.items() if _has_path(source)}
    best = max(fits, key=lambda name: fits[name], default=None)
    if best is None or fits[best] == Fit.NO:
        raise UsageError(
            f"{printable(path)}: expected a folder of class folders, a .csv or .jsonl manifest, a .parquet file, "
            "or the id of a Hugging Face data set"
        )
    return best, {"path": path}


def _has_path(source: type[Source]) -> bool:
    return "path" in inspect.signature(source).parameters
