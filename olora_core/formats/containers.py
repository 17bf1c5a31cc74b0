"""What kind of file the bytes are, told by their beginning, and its rows."""

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import BinaryIO

from . import jsonl
from .jsonl import NOT_JSONL
from .report import Findings
from .rows import Row, Unreadable, chunks_of

MARK = b"\xef\xbb\xbf"
OTHER_FILES = (
    ((b"\xff\xfe", b"\xfe\xff"), "UTF-16 text", "Save the file as UTF-8."),
    ((b"\x1f\x8b",), "a gzip archive", "Unpack it first."),
    ((b"PK\x03\x04",), "a zip archive or a spreadsheet", "Upload the JSONL text itself."),
    ((b"PAR1",), "a parquet file", "Convert it to JSONL: one JSON object per line, in UTF-8."),
)
"""First bytes of files that are none of ours, what they are, and what to do."""


def read_rows(stream: Iterable[bytes] | BinaryIO, findings: Findings) -> Iterator[Row]:
    """Every row of a file; what is wrong with its form goes to the findings."""
    chunks = chunks_of(stream)
    try:
        head = _without_mark(next(chunks, b""), findings)
        yield from jsonl.rows(chain([head], chunks), findings)
    except Unreadable as error:
        findings.add(error.problem, fatal=True)


def _without_mark(head: bytes, findings: Findings) -> bytes:
    """Strips a UTF-8 byte-order mark; raises Unreadable for bytes that begin another kind of file."""
    if head.startswith(MARK):
        findings.note_once(1, "byte_order_mark", "The file begins with a byte-order mark; left out.")
        return head.removeprefix(MARK)
    for magic, kind, fix in OTHER_FILES:
        if head.startswith(magic):
            raise Unreadable(f"{NOT_JSONL} The file is {kind}.", fix, line=1)
    return head
