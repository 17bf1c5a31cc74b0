"""Parquet: columns named after the keys, read in small batches of rows.

Nothing is unpacked before its size is known. A cell is no longer than the page or the dictionary that it is
in, which bounds a batch of rows. A list has any number of elements that refer to one entry of a dictionary;
such columns are therefore read as references, and measured before they become Python objects.
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

from .columns import ColumnMap
from .parquet_layout import Chunk, Leaf, measure, read_layout
from .report import Findings
from .rows import MAX_ROW_BYTES, Row, Unreadable
from .tables import columns_of, record_of

if TYPE_CHECKING:
    import pyarrow

MAGIC = b"PAR1"
ROWS_AT_ONCE = 64
READ_BYTES = 2**20
"""Bytes of a column read from the file at a time."""
BATCH_BYTES = 2**26
"""What a batch may unpack to, unless one row is larger."""
PAGES_BYTES = 2**28
"""What the largest pages of all columns may unpack to, together."""
PAGE_VALUES = 2**24
LIST_VALUES = 2**25
"""Elements of all lists in a row group, as one row may have them all."""
WIDEST = 2**16
"""Bytes of a cell of fixed width."""
ROWS = 2**20
UNPACKED_BYTES = 2**30
"""Rows, and bytes after unpacking, that a file of any size may have."""
TIMES = 100
"""How many times its size a column of lists may unpack to, if that is more than PAGES_BYTES."""
ALL_TIMES = 1000
"""How many times its size a file may unpack to, if that is more than UNPACKED_BYTES."""


def rows(file: BinaryIO, mapping: ColumnMap, findings: Findings) -> Iterator[Row]:
    """Every row. Raises Unreadable."""
    try:
        import pyarrow
    except ImportError:
        raise Unreadable(
            "The file is a Parquet file, and pyarrow, which reads them, is not installed here.",
            "Install it, or convert the file to JSONL.",
        ) from None
    number = 0
    try:
        table = _Table(file, mapping, findings)
        for batch in table.batches():
            for cells in table.cells(batch):
                number += 1
                yield Row(number, _record(cells, number, findings))
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, MemoryError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].removesuffix(".")
        raise Unreadable(
            f"The Parquet file cannot be read after row {number}: {reason[:200]}.",
            "It is damaged or incomplete; write it again.",
            line=number + 1,
        ) from None


def _record(cells: dict[str, Any] | None, number: int, findings: Findings) -> dict[str, Any] | None:
    if cells is not None:
        return record_of(_without_nulls(cells), number, findings)
    findings.refuse(number, f"is longer than {MAX_ROW_BYTES // 2**20} MB.", "Split the example.")
    return None


class _Table:
    """An open file, and its columns that are read."""

    def __init__(self, file: BinaryIO, mapping: ColumnMap, findings: Findings) -> None:
        from pyarrow.parquet import ParquetFile

        self.file, self.layout, self.unpacked = file, read_layout(file), 0
        if self.layout.rows > max(ROWS, self.layout.bytes):
            raise _too_large(f"its {self.layout.bytes:,} bytes are {self.layout.rows:,} rows")
        lists = [leaf.path for leaf in self.layout.leaves if leaf.is_repeated]
        self.reader = ParquetFile(file, read_dictionary=lists, buffer_size=READ_BYTES, pre_buffer=False)
        names = self._names()
        keys = zip(names, columns_of(names, mapping, findings), strict=True)
        self.keys = {name: key for name, key in keys if key}

    def _names(self) -> list[str]:
        names: list[str] = self.reader.schema_arrow.names
        if not names:
            raise ValueError("it has no columns")
        return names

    def _is_read(self, leaf: Leaf) -> bool:
        return any(leaf.path == name or leaf.path.startswith(f"{name}.") for name in self.keys)

    def batches(self) -> "Iterator[pyarrow.RecordBatch]":
        """Every row, a few at a time. Raises Unreadable before it would take too much memory."""
        for group, chunks in enumerate(self.layout.groups):
            at_once = self._rows_at_once(chunks)
            yield from self.reader.iter_batches(
                at_once, row_groups=[group], columns=list(self.keys), use_threads=False
            )

    def _rows_at_once(self, chunks: list[Chunk]) -> int:
        """How many rows of a row group are read together. Raises Unreadable if one could be too many."""
        widest = elements = 0
        for leaf, chunk in zip(self.layout.leaves, chunks, strict=True):
            if not self._is_read(leaf):
                continue
            column = measure(self.file, chunk)
            widest += max(column.page_bytes + column.dictionary_bytes, leaf.width)
            if column.page_values > PAGE_VALUES:
                raise _too_large(f"a page of '{leaf.path}' has {column.page_values:,} values")
            if leaf.width > WIDEST:
                raise _too_large(f"the cells of '{leaf.path}' have {leaf.width:,} bytes")
            if leaf.is_repeated:
                elements += column.values * max(1, leaf.width // 8)
                if column.bytes > max(PAGES_BYTES, TIMES * chunk.packed_bytes):
                    raise _too_large(f"'{leaf.path}' unpacks to {column.bytes:,} bytes")
        if widest > PAGES_BYTES:
            raise _too_large(f"its pages unpack to {widest:,} bytes at a time")
        if elements > LIST_VALUES:
            raise _too_large(f"the lists of a row group have {elements:,} elements")
        return min(ROWS_AT_ONCE, max(1, BATCH_BYTES // max(widest, 1)))

    def cells(self, batch: "pyarrow.RecordBatch") -> Iterator[dict[str, Any] | None]:
        """The cells of each row, by key; None for a row that is too long. Raises Unreadable."""
        size = _bytes_of(batch.columns)
        self.unpacked += size
        if self.unpacked > max(UNPACKED_BYTES, ALL_TIMES * self.layout.bytes):
            raise _too_large(f"its {self.layout.bytes:,} bytes unpack to more than {self.unpacked:,}")
        fits = size <= MAX_ROW_BYTES
        for part in [batch] if fits else [batch.slice(i, 1) for i in range(batch.num_rows)]:
            if fits or _bytes_of(part.columns) <= MAX_ROW_BYTES:
                for row in part.to_pylist(maps_as_pydicts="strict"):
                    yield {self.keys[name]: cell for name, cell in row.items()}
            else:
                yield None


def _too_large(what: str) -> Unreadable:
    return Unreadable(
        f"The Parquet file is not read, because {what}.",
        "Write it with smaller pages and row groups, or as JSONL.",
    )


def _bytes_of(arrays: "Iterable[pyarrow.Array]") -> int:
    """What the values of Arrow arrays take as Python objects: the text, and 8 bytes for each value."""
    return sum(8 * len(array) + _content(array) for array in arrays)


def _content(array: "pyarrow.Array") -> int:
    from pyarrow import compute, types

    kind = array.type
    if types.is_dictionary(kind):
        if not _has_lengths(kind.value_type):
            return 8 * len(array)
        lengths = compute.binary_length(array.dictionary).take(array.indices)
    elif _has_lengths(kind):
        lengths = compute.binary_length(array)
    elif types.is_struct(kind):
        return _bytes_of(array.flatten())
    elif types.is_list(kind) or types.is_large_list(kind):
        return _bytes_of([array.flatten()])
    elif types.is_map(kind):
        first, end = array.offsets[0].as_py(), array.offsets[-1].as_py()
        return _bytes_of(side.slice(first, end - first) for side in (array.keys, array.items))
    else:
        return int(array.nbytes)
    return compute.sum(lengths).as_py() or 0


def _has_lengths(kind: "pyarrow.DataType") -> bool:
    from pyarrow import types

    text = types.is_string(kind) or types.is_large_string(kind)
    return text or types.is_binary(kind) or types.is_large_binary(kind)


def _without_nulls(value: Any) -> Any:
    """Arrow gives every object all keys of its column, with null for those that a row does not have."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
