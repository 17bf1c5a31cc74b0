"""Rows of a training file of any kind, and chunks of its bytes."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from .report import Problem

MAX_ROW_BYTES = 16 * 2**20
CHUNK_BYTES = 2**18
HEAD_BYTES = 2**16
"""Bytes from which the kind of file is detected."""


@dataclass(frozen=True)
class Row:
    number: int
    """Its line, element or row in the file, from 1."""
    record: dict[str, Any] | None
    """None if it could not be read; the findings say why."""


class Unreadable(Exception):
    """The rest of the file cannot be read; `problem` says why."""

    def __init__(self, message: str, fix: str, line: int | None = None) -> None:
        super().__init__(message)
        self.problem = Problem(line=line, path=None, code="data_type", message=message, fix=fix)


def chunks_of(stream: Iterable[bytes] | BinaryIO) -> Iterator[bytes]:
    """The bytes in chunks; the first has at least HEAD_BYTES, or all of them."""
    chunks = _read_chunks(cast(BinaryIO, stream)) if hasattr(stream, "read") else iter(stream)
    head = bytearray()
    for chunk in chunks:
        head += chunk
        if len(head) >= HEAD_BYTES:
            break
    if head:
        yield bytes(head)
    yield from chunks


def _read_chunks(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(CHUNK_BYTES):
        yield chunk
