"""JSONL: one JSON object per line."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from .json_text import BadValue, read_json
from .report import Findings, Problem
from .rows import MAX_ROW_BYTES, Row

NOT_JSONL = "Expected file to have JSONL format, where every line is a JSON dictionary."


def rows(chunks: Iterable[bytes], findings: Findings) -> Iterator[Row]:
    """Every line that is not blank."""
    for line in _lines(chunks, findings):
        yield Row(line.number, _parse(line, findings))


@dataclass(frozen=True)
class _Line:
    number: int
    data: bytes
    """Without the line end; only the beginning if `too_long`."""
    too_long: bool = False


def _lines(chunks: Iterable[bytes], findings: Findings) -> Iterator[_Line]:
    """Lines that are not blank, without line ends; buffers at most MAX_ROW_BYTES and a chunk."""
    number, cut, buffer = 1, False, bytearray()
    for chunk in chunks:
        start = 0
        while (end := chunk.find(b"\n", start)) >= 0:
            buffer += chunk[start:end]
            yield from _line(number, buffer, cut, findings)
            number, cut, start = number + 1, False, end + 1
            buffer.clear()
        buffer += chunk[start:]
        if len(buffer) > MAX_ROW_BYTES:
            cut = True
            del buffer[200:]
    yield from _line(number, buffer, cut, findings)


def _line(number: int, buffer: bytearray, cut: bool, findings: Findings) -> Iterator[_Line]:
    if not cut and len(buffer) <= MAX_ROW_BYTES:
        data = bytes(buffer)
        if data.endswith(b"\r"):
            findings.note_once(number, "crlf", "Lines end in CR LF, read as LF.")
        data = data.strip()
        if data:
            yield _Line(number, data)
        elif buffer:
            findings.note_once(number, "blank_line", f"Line {number} is blank; blank lines are skipped.")
    else:
        yield _Line(number, bytes(buffer[:200]), too_long=True)


def _parse(line: _Line, findings: Findings) -> dict[str, Any] | None:
    """The line's JSON object, or None after adding an error."""
    if line.too_long:
        findings.refuse(
            line.number,
            f"is longer than {MAX_ROW_BYTES // 2**20} MB.",
            "Split the example; one line holds one conversation.",
        )
        return None
    text = ""
    try:
        text = line.data.decode("utf-8")
        record = read_json(text)
    except UnicodeDecodeError as error:
        findings.refuse(
            line.number,
            f"is not UTF-8 (byte 0x{line.data[error.start]:02x} at position {error.start + 1} of the line).",
            "Save the file as UTF-8.",
        )
    except BadValue as error:
        findings.refuse(line.number, f"holds {error.what}.", error.fix)
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at position {error.pos + 1}"
        _refuse(line.number, text, f"{_remedy(text)} The parser says: {reason}.", findings)
    else:
        if isinstance(record, dict):
            return record
        _refuse(line.number, text, _remedy(text), findings)
    return None


def _refuse(number: int, text: str, fix: str, findings: Findings) -> None:
    """The message is OpenAI's."""
    start = text[:40].replace('"', "'")
    message = f'{NOT_JSONL} Line {number} is not a dictionary (HINT: line starts with: "{start}").'
    findings.add(Problem(line=number, path=None, code="data_type", message=message, fix=fix), fatal=True)


def _remedy(text: str) -> str:
    if text.startswith("["):
        return "Write each element of the list as a line of its own, without brackets and commas between."
    if text in ("{", "[") or text.endswith((",", "{", ": [")):
        return "Write each object on one line; pretty-printed JSON is not JSONL."
    return "Write one complete JSON object per line."
