"""Weights of messages and of rows: how much their tokens count in the loss."""

from typing import Any

from .report import Add, named


def check_message_weight(weight: Any, path: str, add: Add) -> None:
    """From 0 to 1."""
    if weight is not None and not _is_weight(weight):
        add(
            path,
            "invalid_weight",
            f"the weight is {_shown(weight)}.",
            "Use a number from 0 (not trained) to 1 (trained in full).",
        )


def check_row_weight(record: dict[str, Any], add: Add) -> None:
    """Above 0 and at most 1: a row without weight is left out by its author."""
    weight = record.get("weight")
    if weight is not None and not (_is_weight(weight) and weight > 0):
        add(
            "$.weight",
            "invalid_weight",
            f"the weight is {_shown(weight)}.",
            "Use a number above 0 and at most 1, or leave the line out.",
        )


def refuse_row_weight(record: dict[str, Any], add: Add) -> None:
    """For preferences, whose loss is over pairs."""
    if record.get("weight") is not None:
        add("$.weight", "invalid_weight", "a preference has no weight.", "Leave the key out.")


def check_whole_weights(messages: list[Any], path: str, add: Add, first: int = 0) -> None:
    """In the answers of a preference, a message is trained or not."""
    for i, message in enumerate(messages, first):
        weight = message.get("weight") if isinstance(message, dict) else None
        if _is_weight(weight) and weight not in (0, 1):
            add(
                f"{path}[{i}].weight",
                "invalid_weight",
                f"the weight is {_shown(weight)}, in a preference.",
                "Use 0 (not trained) or 1 (trained).",
            )


def row_weight(record: dict[str, Any]) -> dict[str, Any]:
    """The row's weight as part of a record; nothing if it has none."""
    return {} if record.get("weight") is None else {"weight": record["weight"]}


def _is_weight(weight: Any) -> bool:
    return isinstance(weight, int | float) and not isinstance(weight, bool) and 0 <= weight <= 1


def _shown(weight: Any) -> str:
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    return repr(weight)[:20] if is_number else named(weight)
