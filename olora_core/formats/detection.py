"""Which format a record is in."""

from collections.abc import Mapping
from typing import Any

from ..specs import nearest
from .preference import PREFERENCE_KEYS
from .report import Add, Format


def detect_format(record: Mapping[str, Any]) -> Format | None:
    """The format of one record by its keys, or None."""
    if any(key in record for key in PREFERENCE_KEYS):
        return "preference"
    if "messages" in record:
        return "chat"
    if "prompt" in record and "completion" in record:
        return "completion"
    if "text" in record:
        return "text"
    return None


def name_unknown_format(record: dict[str, Any], expected: Format | None, add: Add) -> None:
    """Says what a line lacks that fits no format."""
    for key, name in (("conversations", "ShareGPT"), ("instruction", "Alpaca")):
        if key in record:
            add(
                "$",
                "unexpected_file_format",
                f"the line is in {name} format, which is not read.",
                'Convert it to {"messages": [{"role": "user", "content": …}, '
                '{"role": "assistant", "content": …}]}.',
            )
            return
    if "prompt" in record or "completion" in record or expected == "completion":
        missing = "completion" if "prompt" in record else "prompt"
        add(
            f"$.{missing}",
            "missing_key",
            f"'{missing}' is missing.",
            "Give each line a prompt and a completion.",
        )
        return
    for key in record:
        if hint := nearest(key, ("messages", "prompt", "completion")):
            add(
                "$",
                "missing_messages_list",
                f"'messages' is missing; '{key}' is unknown{hint}.",
                "Rename it.",
            )
            return
    add(
        "$",
        "missing_messages_list",
        "neither 'messages' nor 'prompt' with 'completion' is there.",
        'Give each line {"messages": […]} or {"prompt": …, "completion": …}.',
    )
