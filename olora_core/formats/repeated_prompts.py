"""Preference pairs whose answers are whole conversations: the prompt is what both begin with."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ASKING = ("system", "developer", "user")
TURN = re.compile(r"\n\n(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class Parted:
    """Two conversations, parted where their answers begin."""

    prompt: list[Any]
    chosen: list[Any]
    rejected: list[Any]


class NotParted(Exception):
    """The conversations have no common prompt: a code, the sentence and the remedy."""

    def __init__(self, code: str, what: str, fix: str) -> None:
        super().__init__(what)
        self.code, self.what, self.fix = code, what, fix


def part(chosen: Sequence[Any], rejected: Sequence[Any]) -> Parted:
    """Raises NotParted unless they begin with the same messages and go on with answers alone."""
    if _same(chosen, rejected):
        raise NotParted(
            "equal_preference",
            "both conversations are equal, so there is nothing to prefer.",
            "Give two different answers, or leave the line out.",
        )
    at = _common(chosen, rejected)
    while at and not all(at < len(side) and _role(side[at]) == "assistant" for side in (chosen, rejected)):
        at -= 1
    if not at:
        raise NotParted(
            "no_common_prompt",
            "the two conversations do not begin with the same messages, so they have no common prompt.",
            "Let both repeat the prompt, or give it as 'prompt'.",
        )
    if any(_role(message) in ASKING for message in (*chosen[at:], *rejected[at:])):
        raise NotParted(
            "no_common_prompt",
            f"the two conversations differ from message {at + 1} on, before their last question.",
            "Let both have the same messages up to the answers that are compared.",
        )
    return Parted(list(chosen[:at]), list(chosen[at:]), list(rejected[at:]))


def _common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many messages both begin with."""
    length = min(len(one), len(other))
    return next((i for i in range(length) if not _same(one[i : i + 1], other[i : i + 1])), length)


def begins_with(messages: Sequence[Any], prompt: Sequence[Any]) -> bool:
    return len(prompt) > 0 and _same(messages[: len(prompt)], prompt)


def _same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    return [_without_nulls(message) for message in one] == [_without_nulls(message) for message in other]


def _without_nulls(message: Any) -> Any:
    if isinstance(message, Mapping):
        return {key: value for key, value in message.items() if value is not None}
    return message


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, Mapping) else None


def holds_question(messages: Sequence[Any]) -> bool:
    """Whether messages are more than answers."""
    return any(_role(message) in ASKING for message in messages)


def asks(messages: Sequence[Any], text: str) -> bool:
    """Whether one of the questions is this text."""
    questions = [message.get("content") for message in messages if _role(message) == "user"]
    return any(isinstance(asked, str) and asked.strip() == text.strip() for asked in questions)


def turns_of(text: str) -> list[dict[str, Any]] | None:
    """The messages of a transcript with "Human:" or "Assistant:" before each turn, as in HH-RLHF.

    None if the text is none.
    """
    before, *parts = TURN.split(f"\n\n{text.lstrip()}")
    if before.strip() or "Assistant" not in parts[::2]:
        return None
    messages: list[dict[str, Any]] = []
    for speaker, said in zip(parts[::2], parts[1::2], strict=True):
        role, content = ROLES[speaker], said.strip()
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += f"\n\n{content}"
        else:
            messages.append({"role": role, "content": content})
    return messages
