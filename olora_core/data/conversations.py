"""Messages as chat templates expect them."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from ..formats import REASONING, plain_text

Messages = list[dict[str, Any]]


def normalised(messages: Iterable[dict[str, Any]]) -> Messages:
    """Content as a string, arguments as objects, current role names, and no key without a value."""
    return [_normalised(message) for message in messages]


def _normalised(message: dict[str, Any]) -> dict[str, Any]:
    kept = ("role", "name", "tool_call_id")
    plain = {key: message[key] for key in kept if message.get(key)}
    plain["role"] = {"developer": "system", "function": "tool"}.get(plain["role"], plain["role"])
    plain["content"] = plain_text(message.get("content"))
    calls = message.get("tool_calls") or []
    if message.get("function_call"):
        calls = [{"id": "call", "type": "function", "function": message["function_call"]}]
    if calls:
        plain["tool_calls"] = [_call(call, written=_as_object) for call in calls]
    reasoning = next((text for key in REASONING if (text := message.get(key))), None)
    if reasoning:
        # gpt-oss reads `thinking`, the others `reasoning_content`.
        plain["reasoning_content"] = plain["thinking"] = reasoning
    return plain


def with_texts(value: Any, changed: Callable[[str], str]) -> Any:
    """A copy of a JSON value with every string in it changed; keys stay."""
    if isinstance(value, str):
        return changed(value)
    if isinstance(value, dict):
        return {key: with_texts(item, changed) for key, item in value.items()}
    return [with_texts(item, changed) for item in value] if isinstance(value, list) else value


Spelling = Callable[[Messages], Messages]


def spellings(messages: Messages) -> Iterator[Spelling]:
    """Ways to write this conversation, some of which each family's template requires. The plain one first."""
    yield _plain
    if any("tool_calls" in message for message in messages):
        yield _with_string_arguments  # where objects are refused, or printed as Python does
        yield _with_absent_content
        yield lambda plain: _with_absent_content(_with_string_arguments(plain))
        yield _with_short_ids  # Mistral
        yield lambda plain: _with_short_ids(_with_string_arguments(plain))
    yield _in_parts  # multimodal models


def _plain(messages: Messages) -> Messages:
    return messages


def is_garbled(text: str, messages: Messages) -> bool:
    """Whether a text shows arguments, content in parts or absent content as Python writes them."""
    calls = [call["function"] for message in messages for call in message.get("tool_calls", [])]
    values = [function["arguments"] for function in calls] + [message["content"] for message in messages]
    if any(value and str(value) in text for value in values if isinstance(value, dict | list)):
        return True
    return None in values and text.count("None") > json.dumps(messages).count("None")


def _call(call: dict[str, Any], *, written: Callable[[Any], Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": written(function.get("arguments", {}))}}


def _as_object(arguments: Any) -> Any:
    return json.loads(arguments) if isinstance(arguments, str) else arguments


def _with_string_arguments(messages: Messages) -> Messages:
    """Arguments as JSON in a string."""
    return [_with_calls(message, partial(_call, written=_as_json)) for message in messages]


def _with_absent_content(messages: Messages) -> Messages:
    """No content at all beside tool calls, where it is empty."""
    return [
        {**message, "content": None} if "tool_calls" in message and not message["content"] else message
        for message in messages
    ]


def _with_short_ids(messages: Messages) -> Messages:
    """Ids of nine letters and digits: a digest of those that are others."""
    shortened = [
        _with_calls(message, lambda call: {**call, "id": _short(call["id"])}) for message in messages
    ]
    return [
        {**message, "tool_call_id": _short(message["tool_call_id"])} if "tool_call_id" in message else message
        for message in shortened
    ]


def _short(name: str) -> str:
    return name if re.fullmatch("[a-zA-Z0-9]{9}", name) else hashlib.sha256(name.encode()).hexdigest()[:9]


def _in_parts(messages: Messages) -> Messages:
    """Content as a list of parts."""
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


def _with_calls(
    message: dict[str, Any], changed: Callable[[dict[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    if "tool_calls" not in message:
        return message
    return {**message, "tool_calls": [changed(call) for call in message["tool_calls"]]}


def _as_json(arguments: Any) -> str:
    return json.dumps(arguments, ensure_ascii=False)
