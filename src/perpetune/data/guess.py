"""Find the source that can read a path."""

from __future__ import annotations

import inspect
import os
import re
import warnings
from collections.abc import Mapping
from typing import Any

from perpetune.data.names import printable
from perpetune.data.sources import Fit, Kind, Source, existing
from perpetune.errors import DataError, UsageError


def guess_source(
    path: str, sources: Mapping[str, type[Source]], wanted: Kind | None = None
) -> tuple[str, dict[str, Any]]:
    """The name and the options of the source that can read `path`. Each source says how sure it is (`Source.fits`).

    Where a kind is `wanted`, sources of that kind come first: captions beside pictures do not make them texts. Where
    several are equally sure, the first of them is taken. A source without an option `path`, such as `digits`, is meant
    where its own name is given.

    Args:
        path: a file, a folder, the name of a source, or the id of a data set on the Hugging Face hub.
        sources: all sources, by name.
        wanted: the expected kind of data, if it is known, because some files could have either kind.

    Raises:
        UsageError: nothing fits, or only what is of another kind.
        DataError: nothing is there, it is neither a file nor a folder, or a folder cannot be read.
    """
    if path.lower() in sources and not os.path.isdir(path) and not _has_path(sources[path.lower()]):
        return path.lower(), {}
    if os.path.exists(path):
        existing(path, "data")
    fits = {name: source.fits(path, wanted) for name, source in sources.items() if _has_path(source)}
    mine = {name: fit for name, fit in fits.items() if wanted is None or sources[name].gives == wanted}
    best = max(mine, key=lambda name: mine[name], default=None)
    sure = mine[best] if best is not None else Fit.NO
    other = max(fits, key=lambda name: fits[name], default=None)
    if best is None or sure == Fit.NO or (sure == Fit.ANY and other is not None and fits[other] > Fit.ANY):
        if not os.path.exists(path):
            raise DataError(f"{printable(path)}: no such file or folder{_hint(path)}")
        if wanted is not None and other is not None and fits[other] > Fit.NO and sources[other].gives != wanted:
            raise UsageError(
                f"data: {printable(path)} is for the reader `{other}`: these are {sources[other].gives}, and the "
                f"backbone takes {wanted}: {_EXPECTED[wanted]}"
            )
        expected = _EXPECTED[wanted] if wanted is not None else f"{_EXPECTED['pictures']}; or {_EXPECTED['texts']}"
        raise UsageError(f"{printable(path)}: expected {expected}{_other_form(path)}")
    if sure == Fit.ANY and not os.path.exists(path):
        warnings.warn(
            f"{printable(path)}: no such file or folder here; the reader `{best}` is asked for data of that name",
            stacklevel=2,
        )
    return best, {"path": path}


_EXPECTED: dict[Kind, str] = {
    "pictures": "a folder of class folders, a .csv, .jsonl or .json manifest, a .parquet file, or the id of a Hugging "
    "Face data set",
    "texts": "a .jsonl, .json, .csv or .parquet file with prompts and answers, or a folder of such files",
    "pictured": "a .jsonl, .json, .csv or .parquet file with images, prompts and answers, or a folder of such files",
}


def _other_form(path: str) -> str:
    """What is said of a file that holds data in a form that no source reads."""
    lower = path.lower()
    if lower.endswith((".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar")):
        return "; unpack this archive and name its folder"
    return "; save this sheet as CSV" if lower.endswith((".xls", ".xlsx", ".ods")) else ""


def _hint(path: str) -> str:
    """What is said of a path that is not there, beside that."""
    if re.fullmatch(r"[\w-][\w.-]*", path) and not os.path.splitext(path)[1]:
        return "; a data set on the Hugging Face hub is named OWNER/NAME"
    return ""


def _has_path(source: type[Source]) -> bool:
    return "path" in inspect.signature(source).parameters
