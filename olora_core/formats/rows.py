"""A row of a training file, whatever kind of file it is kept in, and the bytes that it is read from."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from .report import Problem

MAX_ROW_BYTES = 16 * 2**20
CHUNK_BYTES = 2**18
HEAD_BYTES = 2**16
"""What is looked at to tell what kind of file it is."""


@dataclass(frozen=True)
class Row:
    number: int
    """From 1: its line in the file."""
    record: dict[str, Any] | None
    """None where none could be read; the findings say why."""


class Unreadable(Exception):
    """Nothing more can be read of the file; carries the Problem."""

    def __init__(self, message: str, fix: str, line: int | None = None) -> None:
        super().__init__(message)
        self.problem = Problem(line=line, path=None, code="data_type", message=message, fix=fix)


def chunks_of(stream: Iterable[bytes] | BinaryIO) -> Iterator[bytes]:
    """Bytes in pieces; the first holds HEAD_BYTES, or all that there are."""
    pieces = _read_chunks(cast(BinaryIO, stream)) if hasattr(stream, "read") else iter(stream)
    head = bytearray()
    for piece in pieces:
        head += piece
        if len(head) >= HEAD_BYTES:
            break
    if head:
        yield bytes(head)
    yield from pieces


def _read_chunks(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(CHUNK_BYTES):
        yield chunk
