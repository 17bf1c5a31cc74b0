"""The kind of file, detected from its first bytes, and its rows."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import BinaryIO, cast

from . import csv_table, json_array, jsonl, parquet
from .columns import ColumnMap
from .jsonl import NOT_JSONL
from .report import Container, Findings
from .rows import Row, Unreadable, chunks_of

MARK = b"\xef\xbb\xbf"
OTHER_FILES = (
    ((b"\xff\xfe", b"\xfe\xff"), "UTF-16 text", "Save the file as UTF-8."),
    ((b"\x1f\x8b",), "a gzip archive", "Unpack it first."),
    ((b"PK\x03\x04",), "a zip archive or a spreadsheet", "Upload the JSONL text itself, or CSV in UTF-8."),
)
"""First bytes of files that are not supported, what they are, and the remedy."""


def read_rows(
    stream: Iterable[bytes] | BinaryIO,
    findings: Findings,
    columns: Mapping[str, str] | None = None,
    *,
    keep: str | None = None,
) -> Iterator[Row]:
    """Every row of a file; errors of its form are added to the findings.

    `columns` has the file's column of each key that has another name there; `keep` is a column of a table
    that is read although its format does not have it. Raises SpecError for `columns` that are no mapping of
    known keys. A file of no known kind is read, and refused, as JSONL.
    """
    mapping, chunks = ColumnMap(columns, keep), chunks_of(stream)
    try:
        head = _without_mark(next(chunks, b""), findings)
        whole, findings.report.container = chain([head], chunks), _container(head)
        match findings.report.container:
            case "parquet":
                yield from parquet.rows(_from_its_beginning(stream), mapping, findings)
            case "json":
                yield from _mapped(json_array.rows(whole, findings), mapping, findings)
            case "csv":
                yield from csv_table.rows(whole, mapping, findings)
            case "jsonl":
                yield from _mapped(jsonl.rows(whole, findings), mapping, findings)
    except Unreadable as error:
        findings.add(error.problem, fatal=True)


def _mapped(rows: Iterator[Row], mapping: ColumnMap, findings: Findings) -> Iterator[Row]:
    """Rows of objects, which may each have other keys; a mapped key must occur in one of them."""
    findings.columns = [mapping.shown(column) for column in mapping.columns.values()]
    yield from map(mapping.row, rows)
    if findings.report.fatal is None:
        mapping.require_all()


def container_of(path: Path) -> Container:
    """The kind of the file at `path`."""
    with path.open("rb") as file:
        return _container(next(chunks_of(file), b"").removeprefix(MARK))


def _container(head: bytes) -> Container:
    if head.startswith(parquet.MAGIC):
        return "parquet"
    if json_array.looks_like(head):
        return "json"
    return "csv" if csv_table.delimiter_of(head) else "jsonl"


def _from_its_beginning(stream: Iterable[bytes] | BinaryIO) -> BinaryIO:
    """The file, rewound: Parquet needs random access, as its index is at the end."""
    if not hasattr(stream, "seek"):
        raise Unreadable("A parquet file is read from a file, not from a stream of bytes.", "Store it first.")
    file = cast(BinaryIO, stream)
    file.seek(0)
    return file


def _without_mark(head: bytes, findings: Findings) -> bytes:
    """Strips a UTF-8 byte-order mark; raises Unreadable for bytes that begin another kind of file."""
    if head.startswith(MARK):
        findings.note_once(1, "byte_order_mark", "The file begins with a byte-order mark, which is ignored.")
        return head.removeprefix(MARK)
    for magic, kind, fix in OTHER_FILES:
        if head.startswith(magic):
            raise Unreadable(f"{NOT_JSONL} The file is {kind}.", fix, line=1)
    return head
