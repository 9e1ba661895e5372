"""Find the source that can read a path."""

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
    """The name and the options of the source that can read `path`. Each source says how sure it is (`Source.fits`).

    If several are equally sure, the first of them is taken. A source without an option `path`, such as `digits`, is
    taken if `path` is its name.

    Args:
        path: a file, a folder, the name of a source, or the id of a data set on the Hugging Face hub.
        sources: all sources, by name.
        wanted: the expected kind of data, if it is known, because some files could have either kind.

    Raises:
        UsageError: no source fits.
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
