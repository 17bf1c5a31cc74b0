"""One JSON array of objects, read element by element."""

import codecs
import json
from collections.abc import Iterable, Iterator
from typing import Any

from .json_text import WHITE, BadValue, read_value
from .report import Findings, named
from .rows import MAX_ROW_BYTES, Row, Unreadable

REST = "What follows it was not read."


def looks_like(text: bytes) -> bool:
    """Whether a file with this beginning is an array of objects."""
    begin = text.lstrip()
    return begin[:1] == b"[" and begin[1:].lstrip()[:1] == b"{"


def rows(chunks: Iterable[bytes], findings: Findings) -> Iterator[Row]:
    """Every element. Raises Unreadable where the array is broken."""
    text = _Text(iter(chunks))
    text.take()
    number, mark = 0, ","
    while mark == ",":
        number += 1
        yield Row(number, _element(number, text, findings))
        mark = text.take()
        if mark not in (",", "]"):
            found = f"{mark!r} follows it" if mark else "the file ends after it"
            raise Unreadable(
                f"Element {number} is followed by neither a comma nor the end of the array: {found}.",
                f"Write [{{…}}, {{…}}]. {REST}" if mark else "Send the whole file.",
                line=number,
            )
    if text.take():
        raise Unreadable(
            f"More follows the end of the array, after element {number}.",
            "Write one array, or one JSON object per line without brackets and commas between.",
            line=number,
        )


def _element(number: int, text: "_Text", findings: Findings) -> dict[str, Any] | None:
    try:
        value = text.value()
    except BadValue as error:
        raise Unreadable(f"Element {number} holds {error.what}.", f"{error.fix} {REST}", number) from None
    except json.JSONDecodeError as error:
        raise Unreadable(
            f"Element {number} is not JSON: {error.msg} at position {error.pos + 1} of the element.",
            f"Write [{{…}}, {{…}}]. {REST}",
            number,
        ) from None
    except _TooLong:
        raise Unreadable(
            f"Element {number} is longer than {MAX_ROW_BYTES // 2**20} MB.",
            f"Split the example; one element holds one conversation. {REST}",
            number,
        ) from None
    if isinstance(value, dict):
        return value
    findings.refuse(number, f"is {named(value)}, not an object.", "Write one JSON object for each example.")
    return None


class _TooLong(Exception):
    """A value that does not end within MAX_ROW_BYTES."""


def _is_too_long(text: str, start: int, end: int) -> bool:
    """Whether this part of the text has more bytes than a row may have; a character has at most four."""
    return 4 * (end - start) > MAX_ROW_BYTES and len(text[start:end].encode()) > MAX_ROW_BYTES


class _Text:
    """Text decoded and not yet read: at most one value and a chunk."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text, self._at, self._ended = "", 0, False
        self._bytes = 0

    def take(self) -> str:
        """The next character that is not whitespace, or "" at the end."""
        if not self._skip_whitespace():
            return ""
        self._at += 1
        return self._text[self._at - 1]

    def value(self) -> Any:
        """The next JSON value."""
        self._skip_whitespace()
        while True:
            try:
                value, end = read_value(self._text, self._at)
            except json.JSONDecodeError as error:
                held, position = len(self._text) - self._at, error.pos - self._at
                if held > MAX_ROW_BYTES:
                    raise _TooLong from None
                if self._read_more(held):
                    continue
                raise json.JSONDecodeError(error.msg, self._text[self._at :], position) from None
            if _is_too_long(self._text, self._at, end):
                raise _TooLong
            self._at = end
            return value

    def _skip_whitespace(self) -> bool:
        """Skips whitespace; False at the end of the file."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in WHITE:
                    return True
                self._at += 1
            if not self._read_more(1):
                return False

    def _read_more(self, wanted: int) -> bool:
        """Decodes `wanted` more characters, if there are any; False at the end of the file.

        `value` asks for as many as it holds, doubling them, so that a long value is parsed O(log n) times.
        """
        parts, got = [self._text[self._at :]], 0
        while got < wanted and not self._ended:
            chunk = next(self._chunks, None)
            self._ended = chunk is None
            parts.append(self._decoded(chunk or b""))
            got += len(parts[-1])
        self._text, self._at = "".join(parts), 0
        return got > 0

    def _decoded(self, chunk: bytes) -> str:
        try:
            text = self._decoder.decode(chunk, final=self._ended)
        except UnicodeDecodeError as error:
            held = len(error.object) - len(chunk)  # bytes of a character that began in the previous chunk
            position = self._bytes - held + error.start + 1
            raise Unreadable(
                f"Byte {position} of the file (0x{error.object[error.start]:02x}) is not UTF-8.",
                f"Save the file as UTF-8. {REST}",
            ) from None
        self._bytes += len(chunk)
        return text
