"""Strict JSON: no NaN, no infinite numbers, no unpaired surrogates."""

import json
import math
from typing import Any

WHITE = " \t\r\n"


class BadValue(ValueError):
    """JSON that only Python accepts: `what` it holds, and the `fix`."""

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what)
        self.what = what
        self.fix = fix


def read_json(text: str) -> Any:
    """The value of a JSON text. Raises BadValue or JSONDecodeError."""
    value, end = read_value(text, 0)
    rest = text[end:].lstrip(WHITE)
    if rest:
        raise json.JSONDecodeError("Extra data", text, len(text) - len(rest))
    return value


def read_value(text: str, at: int) -> tuple[Any, int]:
    """The value that begins at position `at`, and the position after it. Raises as `read_json`."""
    try:
        value, end = _DECODER.raw_decode(text, at)
        if text.find("\\ud", at, end) >= 0 or text.find("\\uD", at, end) >= 0:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (BadValue, json.JSONDecodeError):
        raise
    except UnicodeEncodeError:
        raise BadValue(
            "half of a surrogate pair (\\ud800 to \\udfff), which is no character",
            "Write both halves, or the character itself.",
        ) from None
    except (ValueError, RecursionError):
        raise BadValue(
            "a number of too many digits or lists nested too deeply",
            "Shorten the number or flatten the value.",
        ) from None
    return value, end


def _refuse_constant(name: str) -> Any:
    raise BadValue(f"{name}, which is not JSON", "Write null or a finite number instead.")


def _parse_float(digits: str) -> float:
    number = float(digits)
    return number if math.isfinite(number) else _refuse_constant(digits[:20])


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_parse_float)
