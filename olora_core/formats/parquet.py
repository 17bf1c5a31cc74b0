"""Parquet: columns named after the keys, read in small batches of rows."""

from collections.abc import Iterator
from typing import Any, BinaryIO

from .report import Findings
from .rows import Row, Unreadable
from .tables import columns_of, record_of

MAGIC = b"PAR1"
ROWS_AT_ONCE = 64
PAGE_BYTES = 2**20
"""Bytes of a column read from the file at a time."""


def rows(file: BinaryIO, findings: Findings, keep: str | None = None) -> Iterator[Row]:
    """Every row. Raises Unreadable."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise Unreadable(
            "The file is a Parquet file, and pyarrow, which reads them, is not installed here.",
            "Install it, or convert the file to JSONL.",
        ) from None
    number = 0
    try:
        table = parquet.ParquetFile(file, buffer_size=PAGE_BYTES, pre_buffer=False)
        columns = [name for name in columns_of(table.schema_arrow.names, findings, keep) if name]
        for batch in table.iter_batches(ROWS_AT_ONCE, columns=columns, use_threads=False):
            for cells in batch.to_pylist(maps_as_pydicts="strict"):
                number += 1
                yield Row(number, record_of(_without_nulls(cells), number, findings))
    except (pyarrow.ArrowException, OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].removesuffix(".")
        raise Unreadable(
            f"The Parquet file cannot be read after row {number}: {reason[:200]}.",
            "It is damaged or incomplete; write it again.",
            line=number + 1,
        ) from None


def _without_nulls(value: Any) -> Any:
    """Arrow gives every object all keys of its column, with null for those that a row does not have."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
