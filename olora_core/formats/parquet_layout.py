"""What the columns of a Parquet file unpack to, from its metadata and the headers of its pages.

A few bytes may unpack to gigabytes, and the metadata at the file's end need not say so: what a reader
allocates is in the header in front of each page. No page is unpacked to find out. Fields are numbered as in
https://parquet.apache.org/docs/file-format/metadata/.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from io import SEEK_END
from typing import Any, BinaryIO

from .thrift import Struct, read_struct

FOOTER_BYTES = 2**28
HEADER_BYTES = (2**12, 2**16, 2**20, 2**24)
"""Bytes read for a page's header: more if it does not end within them."""
REPEATED = 2
"""The repetition type of the elements of a list."""


@dataclass(frozen=True)
class Leaf:
    """A column of the file; a nested one of the table has several."""

    path: str
    """Names from the table's column on, joined by dots."""
    is_repeated: bool
    """Whether it is in a list."""
    width: int
    """Bytes of a value, if they are fixed by the schema."""


@dataclass(frozen=True)
class Chunk:
    """The pages of one leaf in one row group."""

    start: int
    packed_bytes: int
    values: int


@dataclass(frozen=True)
class Unpacked:
    """What a chunk unpacks to: its largest page, its dictionary, and all of it."""

    page_bytes: int
    dictionary_bytes: int
    bytes: int
    values: int
    page_values: int


@dataclass(frozen=True)
class Layout:
    leaves: list[Leaf]
    groups: list[list[Chunk]]
    """The chunks of each row group, by leaf."""
    rows: int
    bytes: int
    """The file's size."""


def read_layout(file: BinaryIO) -> Layout:
    """Raises ValueError for metadata that are damaged."""
    size = file.seek(0, SEEK_END)
    file.seek(max(0, size - 8))
    length = int.from_bytes(file.read(4), "little")
    if length > min(FOOTER_BYTES, size - 12):
        raise ValueError("it does not end as a parquet file does")
    file.seek(size - 8 - length)
    try:
        footer, _ = read_struct(file.read(length))
    except IndexError:
        raise ValueError("its metadata do not end") from None
    groups = _structs(footer, 4)
    leaves = list(_leaves(_structs(footer, 2)))
    chunks = [[_chunk(column) for column in _structs(group, 1)] for group in groups]
    if any(len(columns) != len(leaves) for columns in chunks):
        raise ValueError("a row group lacks columns")
    return Layout(leaves, chunks, sum(_number(group, 3) for group in groups), size)


def _leaves(schema: list[Struct]) -> Iterator[Leaf]:
    """The schema is a tree in pre-order: each element with its number of children."""
    above = [("", False, _number(schema[0], 5) if schema else 0)]
    for element in schema[1:]:
        while above and above[-1][2] == 0:
            above.pop()
        if not above:
            raise ValueError("its schema is no tree")
        before, repeated, left = above.pop()
        above.append((before, repeated, left - 1))
        name = element.get(4)
        path = before + (name.decode("utf-8", errors="replace") if isinstance(name, bytes) else "")
        repeated = repeated or element.get(3) == REPEATED
        if element.get(5):
            above.append((f"{path}.", repeated, _number(element, 5)))
        else:
            yield Leaf(path, repeated, _number(element, 2) if 2 in element else 0)


def _chunk(column: Struct) -> Chunk:
    about = column.get(3)
    start, dictionary = _number(about, 9), about.get(11) if isinstance(about, dict) else None
    if isinstance(dictionary, int) and 0 < dictionary < start:
        start = dictionary
    return Chunk(start, _number(about, 7), _number(about, 5))


def measure(file: BinaryIO, chunk: Chunk) -> Unpacked:
    """Reads the pages' headers. Raises ValueError for a damaged one."""
    page_bytes = dictionary_bytes = total = seen = page_values = 0
    at = chunk.start
    while seen < chunk.values:
        if at > chunk.start + chunk.packed_bytes:
            raise ValueError("a column ends before its last page")
        header, length = _page_header(file, at)
        at += length + _number(header, 3)
        unpacked = _number(header, 2)
        total += unpacked
        if 7 in header:
            dictionary_bytes += unpacked
            page_values = max(page_values, _number(header[7], 1))
        elif 5 in header or 8 in header:
            values = _number(header.get(5) or header.get(8), 1)
            page_bytes, page_values = max(page_bytes, unpacked), max(page_values, values)
            seen += values
    return Unpacked(page_bytes, dictionary_bytes, total, seen, page_values)


def _page_header(file: BinaryIO, at: int) -> tuple[Struct, int]:
    for wanted in HEADER_BYTES:
        file.seek(at)
        try:
            return read_struct(file.read(wanted))
        except IndexError:
            continue
    raise ValueError("the header of a page does not end")


def _structs(fields: Struct, number: int) -> list[Struct]:
    found = fields.get(number)
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise ValueError("its metadata are damaged")
    return found


def _number(fields: Any, number: int) -> int:
    value = fields.get(number) if isinstance(fields, dict) else None
    if not isinstance(value, int) or value < 0:
        raise ValueError("its metadata are damaged")
    return value
