"""Checks of messages and tools."""

import unicodedata
from typing import Any

from ..specs import nearest
from .report import Add, named
from .tool_calls import Calls, check_answer, check_calls, ids_given, with_ids
from .weights import check_message_weight

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of what an assistant thinks before its answer; canonical records have the first."""
MESSAGE_KEYS = (
    *("role", "content", *REASONING, "name", "weight"),
    *("tool_calls", "tool_call_id", "function_call"),
)
RESPONSE_KEYS = ("refusal", "audio", "annotations")
"""Keys of messages copied from an API response; ignored if empty."""


def check_messages(
    messages: list[Any], path: str, add: Add, calls: Calls | None = None, first: int = 0
) -> None:
    """Checks each message, and each tool message against `calls`, those before it; adds their own calls.

    `messages` are the list at `path` from number `first` on.
    """
    calls = calls or Calls(ids_given(messages))
    for i, message in enumerate(messages, first):
        place = f"{path}[{i}]"
        if not isinstance(message, dict):
            add(
                place,
                "data_type",
                f"a message is an object, not {named(message)}.",
                "Give it role and content.",
            )
            continue
        _check_keys(message, place, add)
        role = message.get("role")
        if role is None:
            add(f"{place}.role", "message_missing_key", "the message has no role.", f"Use one of {_ROLES}.")
            continue
        if not isinstance(role, str) or role not in ROLES:
            hint = nearest(role, ROLES) if isinstance(role, str) else ""
            add(
                f"{place}.role",
                "unrecognized_role",
                f"{role!r} is not a role{hint}.",
                f"Use one of {_ROLES}.",
            )
            continue
        _check_content(message, role, place, add)
        _check_reasoning(message, role, place, add)
        _check_weight(message, role, place, add)
        check_calls(message, role, place, calls, add)
        check_answer(message, role, place, calls, add)


_ROLES = ", ".join(ROLES)


def _check_keys(message: dict[str, Any], place: str, add: Add) -> None:
    for key, value in message.items():
        if key in MESSAGE_KEYS or (key in RESPONSE_KEYS and not value):
            continue
        add(
            f"{place}.{key}",
            "message_unrecognized_key",
            f"'{key}' is not a key of a message{nearest(key, MESSAGE_KEYS)}.",
            f"Known keys: {', '.join(MESSAGE_KEYS)}.",
        )
    name = message.get("name")
    if name is not None and not isinstance(name, str):
        add(f"{place}.name", "data_type", f"the name is {named(name)}.", "Make it a string.")


def _check_content(message: dict[str, Any], role: str, place: str, add: Add) -> None:
    content = message.get("content")
    path = f"{place}.content"
    if content is None:
        if role == "assistant" and (message.get("tool_calls") or message.get("function_call")):
            return
        code = "missing_content" if "content" in message else "message_missing_key"
        needs = " or tool_calls" if role == "assistant" else ""
        add(path, code, f"the {role} message has no content{needs}.", "Write its text.")
    elif isinstance(content, list):
        for i, part in enumerate(content):
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text" or not isinstance(part.get("text"), str):
                add(
                    f"{path}[{i}]",
                    "unsupported_content",
                    f"only parts of type text are read, not {kind or named(part)}.",
                    'Use {"type": "text", "text": …} or a plain string.',
                )
    elif not isinstance(content, str):
        add(path, "data_type", f"the content is {named(content)}.", "Make it a string.")
    elif role == "assistant" and not message.get("tool_calls"):
        check_answer_text(content, path, add)


SHORT = 8
"""Only answers of at most this many characters are checked for punctuation."""


def check_answer_text(text: str, path: str, add: Add) -> None:
    """Warns of an answer that is empty or only punctuation."""
    answer = text.strip()
    if not answer:
        add(path, "empty_answer", "the answer is empty.", "Write it, or leave the line out.", "warning")
    elif len(answer) <= SHORT and all(unicodedata.category(sign)[0] in "PZC" for sign in answer):
        add(
            path,
            "near_empty_answer",
            f"the answer is only {answer!r}.",
            "Write it, or leave the line out; otherwise it is trained as it is.",
            "warning",
        )


def _check_reasoning(message: dict[str, Any], role: str, place: str, add: Add) -> None:
    given = _reasoning(message)
    for key, text in given.items():
        path = f"{place}.{key}"
        if role != "assistant":
            add(path, "message_unrecognized_key", f"a {role} message has no reasoning.", "Leave the key out.")
        elif not isinstance(text, str):
            add(path, "data_type", f"'{key}' is {named(text)}.", "Make it a string.")
        elif text != next(iter(given.values())):
            add(
                path,
                "message_unrecognized_key",
                f"'{key}' and '{next(iter(given))}' differ, and both are the message's reasoning.",
                "Keep one of them.",
            )


def _reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """The keys of a message's reasoning that are not empty."""
    return {key: message[key] for key in REASONING if message.get(key) not in (None, "")}


def _check_weight(message: dict[str, Any], role: str, place: str, add: Add) -> None:
    path = f"{place}.weight"
    if message.get("weight") is not None and role != "assistant":
        add(path, "invalid_weight", f"a {role} message has no weight.", "Keep weight for assistant messages.")
    else:
        check_message_weight(message.get("weight"), path, add)


def check_assistant(messages: list[Any], path: str, add: Add) -> None:
    """At least one assistant message must be trained."""
    answers = [m for m in messages if isinstance(m, dict) and m.get("role") == "assistant"]
    if not answers:
        add(
            path,
            "example_missing_assistant_message",
            "the example has no assistant message, so there is nothing to learn.",
            "Add the answer as an assistant message.",
        )
    elif all(_is_zero(m.get("weight")) for m in answers):
        add(
            path,
            "example_missing_assistant_message",
            "every assistant message has weight 0, so there is nothing to learn.",
            "Give at least one of them a weight above 0, or leave the line out.",
        )


def _is_zero(weight: Any) -> bool:
    return weight == 0 and not isinstance(weight, bool)


def check_tools(record: dict[str, Any], add: Add, path: str = "$") -> None:
    for key, name_of in (("tools", _tool_name), ("functions", _function_name)):
        tools = record.get(key)
        if tools is None:
            continue
        if not isinstance(tools, list):
            add(f"{path}.{key}", "data_type", f"'{key}' is {named(tools)}.", "Make it a list.")
            continue
        for i, tool in enumerate(tools):
            if not isinstance(name_of(tool), str):
                add(
                    f"{path}.{key}[{i}]",
                    "data_type",
                    "the tool has no function with a name.",
                    'Write {"type": "function", "function": {"name": …, "parameters": {…}}}.',
                )


def _tool_name(tool: Any) -> Any:
    return _function_name(tool.get("function")) if isinstance(tool, dict) else None


def _function_name(function: Any) -> Any:
    return function.get("name") if isinstance(function, dict) else None


def uses_role(record: dict[str, Any], role: str) -> bool:
    around = record.get("input")
    asked = around.get("messages") if isinstance(around, dict) else None
    lists = (record.get("messages"), record.get("prompt"), asked)
    messages = [m for group in lists if isinstance(group, list) for m in group]
    return any(isinstance(m, dict) and m.get("role") == role for m in messages)


def check_answer_roles(messages: list[Any], path: str, add: Add) -> None:
    for i, message in enumerate(messages):
        if isinstance(message, dict) and message.get("role") in ("system", "developer", "user"):
            add(
                f"{path}[{i}].role",
                "unrecognized_role",
                f"an answer holds no '{message['role']}' message.",
                "Move it to the prompt.",
            )


def check_other_keys(record: dict[str, Any], known: tuple[str, ...], add: Add, path: str = "$") -> None:
    for key in record:
        if key not in known:
            hint = nearest(key, known)
            add(
                f"{path}.{key}",
                "unrecognized_key",
                f"'{key}' is not part of the format{hint} and is ignored.",
                "",
                "warning",
            )


def canonical_messages(messages: list[dict[str, Any]], calls: Calls) -> list[dict[str, Any]]:
    """Checked messages with an id for each call and its answer, and with one key for the reasoning."""
    return [with_ids(_canonical(message), calls) for message in messages]


def _canonical(message: dict[str, Any]) -> dict[str, Any]:
    plain = {key: value for key, value in message.items() if key not in REASONING}
    if reasoning := _reasoning(message):
        plain["reasoning_content"] = next(iter(reasoning.values()))
    return plain


def plain_text(content: Any) -> str:
    """The text of a message's content: a string, a list of text parts, or null."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content or ""
