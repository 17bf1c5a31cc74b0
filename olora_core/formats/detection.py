"""The format of a record, and for each format its keys, its check and its conversion.

Converted records are of four kinds: chat, completion, text and preference.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..specs import nearest
from . import alpaca, preference, sharegpt, supervised
from .report import MAP_COLUMNS, Add, Format, listed

Record = dict[str, Any]


def _unchanged(record: Record) -> Record:
    return record


@dataclass(frozen=True)
class Form:
    """One format."""

    keys: tuple[str, ...]
    check: Callable[[Record, Add], None]
    convert: Callable[[Record], Record] = _unchanged
    """Turns a record that passed `check` into one of the four kinds."""


FORMATS: dict[Format, Form] = {
    "chat": Form(supervised.CHAT_KEYS, supervised.check_chat, supervised.canonical_chat),
    "completion": Form(
        supervised.COMPLETION_KEYS, supervised.check_completion, supervised.canonical_completion
    ),
    "text": Form(supervised.TEXT_KEYS, supervised.check_text),
    "alpaca": Form(alpaca.KEYS, alpaca.check, alpaca.as_chat),
    "sharegpt": Form(sharegpt.KEYS, sharegpt.check, sharegpt.as_chat),
    "preference": Form(preference.KEYS, preference.check_preference, preference.canonical_preference),
    "alpaca-preference": Form(alpaca.PREFERENCE_KEYS, alpaca.check_preference, alpaca.as_preference),
    "sharegpt-preference": Form(sharegpt.PREFERENCE_KEYS, sharegpt.check_preference, sharegpt.as_preference),
}
KEYS = frozenset(key for form in FORMATS.values() for key in form.keys)


def detect_format(record: Mapping[str, Any]) -> Format | None:
    """The format of a record, from its keys; None if unknown."""
    is_pair = "chosen" in record or "rejected" in record
    if any(key in record for spelling in preference.SPELLINGS[:2] for key in spelling):
        return "preference"
    if "messages" in record and not is_pair:
        return "chat"
    if "conversations" in record:
        return "sharegpt-preference" if is_pair else "sharegpt"
    if "instruction" in record:
        return "alpaca-preference" if is_pair else "alpaca"
    if is_pair:
        return "preference"
    if "prompt" in record and "completion" in record:
        return "completion"
    if "text" in record:
        return "text"
    return None


def canonical(record: Record) -> Record:
    """Converts a record that passed its check to chat, completion, text or preference."""
    format = detect_format(record)
    assert format is not None
    return FORMATS[format].convert(record)


def name_unknown_format(record: Record, expected: Format | None, add: Add) -> None:
    """Adds what is missing from a record that fits no format."""
    found = listed(list(record))
    if "prompt" in record or "completion" in record or expected == "completion":
        missing = "completion" if "prompt" in record else "prompt"
        add(
            f"$.{missing}",
            "missing_key",
            f"'{missing}' is missing; found columns {found}.",
            f"Give each line a prompt and a completion. {MAP_COLUMNS}",
        )
        return
    for key in record:
        if hint := nearest(key, ("messages", "prompt", "completion", "conversations", "instruction", "text")):
            add(
                "$",
                "missing_messages_list",
                f"'messages' is missing; '{key}' is unknown{hint}.",
                f"Rename it. {MAP_COLUMNS}",
            )
            return
    add(
        "$",
        "missing_messages_list",
        f"no known format: found {f'columns {found}' if found else 'no columns'}; expected messages, or "
        "prompt + completion, or instruction + output.",
        f"Rename the columns. {MAP_COLUMNS}",
    )
