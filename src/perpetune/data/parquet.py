"""Read the schema and the columns of parquet files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from perpetune.data.names import printable
from perpetune.data.sources import POINTER, existing, file_start, is_pointer
from perpetune.errors import DataError, MissingExtra


def read_schema(file: str, what: str = "parquet") -> Any:
    """The arrow schema of a parquet file.

    Raises:
        MissingExtra: pyarrow, which the data source `what` needs, is not installed.
        DataError: the file is not a parquet file.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise MissingExtra(f"data: {what}", "data") from None
    existing(file, "parquet file")
    try:
        return pq.read_schema(file)
    except (pa.ArrowException, OSError) as error:
        reason = (
            POINTER if is_pointer(file_start(file)) else f"not a readable parquet file: {str(error).splitlines()[0]}"
        )
        raise DataError(f"{printable(file)}: {reason}") from error


def read_columns(file: str, names: Sequence[str]) -> Any:
    """The named columns of a parquet file, as a `pyarrow.Table`; DataError if it cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(file, columns=list(names), partitioning=None)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{printable(file)}: not a readable parquet file: {str(error).splitlines()[0]}") from error
