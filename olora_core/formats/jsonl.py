"""JSONL: a JSON object a line."""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

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
    """Without its end; only the beginning when `too_long`."""
    too_long: bool = False


def _lines(chunks: Iterable[bytes], findings: Findings) -> Iterator[_Line]:
    """Lines that are not blank, ends stripped; never holds more than MAX_ROW_BYTES and a chunk."""
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
            findings.note_once(number, "crlf", "Lines end in CR LF; read as plain line ends.")
        data = data.strip()
        if data:
            yield _Line(number, data)
        elif buffer:
            findings.note_once(number, "blank_line", f"Line {number} is blank; blank lines are left out.")
    else:
        yield _Line(number, bytes(buffer[:200]), too_long=True)


def _parse(line: _Line, findings: Findings) -> dict[str, Any] | None:
    """The line's JSON object, or None after adding why it has none."""

    def refuse(message: str, fix: str) -> None:
        problem = Problem(line=line.number, path=None, code="data_type", message=message, fix=fix)
        findings.add(problem, fatal=True)

    if line.too_long:
        refuse(
            f"Line {line.number} is longer than {MAX_ROW_BYTES // 2**20} MB.",
            "Split the example; one line holds one conversation.",
        )
        return None
    try:
        text = line.data.decode("utf-8")
    except UnicodeDecodeError as error:
        refuse(
            f"Line {line.number} is not UTF-8 (byte 0x{line.data[error.start]:02x} at position "
            f"{error.start + 1} of the line).",
            "Save the file as UTF-8.",
        )
        return None
    try:
        record = _DECODER.decode(text)
        if "\\ud" in text.lower():
            json.dumps(record, ensure_ascii=False).encode("utf-8")
    except _NotFinite as error:
        refuse(
            f"Line {line.number} holds {error}, which is not JSON.",
            "Write null or a finite number instead.",
        )
    except UnicodeEncodeError:
        refuse(
            f"Line {line.number} holds half of a surrogate pair (\\ud800 to \\udfff), which is no character.",
            "Write both halves, or the character itself.",
        )
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at position {error.pos + 1}"
        refuse(_not_a_dictionary(line.number, text), f"{_remedy(text)} The parser says: {reason}.")
    except (ValueError, RecursionError):
        refuse(
            f"Line {line.number} holds a number of too many digits or lists nested too deeply.",
            "Shorten the number or flatten the value.",
        )
    else:
        if isinstance(record, dict):
            return record
        refuse(_not_a_dictionary(line.number, text), _remedy(text))
    return None


def _not_a_dictionary(number: int, text: str) -> str:
    start = text[:40].replace('"', "'")
    return f'{NOT_JSONL} Line {number} is not a dictionary (HINT: line starts with: "{start}").'


def _remedy(text: str) -> str:
    if text.startswith("["):
        return "Write each element of the list as a line of its own, without brackets and commas between."
    if text in ("{", "[") or text.endswith((",", "{", ": [")):
        return "Write each object on one line; pretty-printed JSON is not JSONL."
    return "Write one complete JSON object per line."


class _NotFinite(ValueError):
    """NaN or an infinite number."""


def _refuse_constant(name: str) -> Any:
    raise _NotFinite(name)


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise _NotFinite(digits[:20])
    return number


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite)
