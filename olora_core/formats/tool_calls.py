"""The tool calls of a conversation: their checks, their ids, and the calls that tool messages answer."""

import json
from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import Any

from .report import Add, named


class Calls:
    """The calls so far, and those that wait for an answer, in their order.

    A call without an id gets one of nine letters and digits, as some families' templates demand, that no
    other call of the row has. The same row always gets the same ids.
    """

    def __init__(self, given: Iterable[str] = ()) -> None:
        """`given` are the ids that the row has itself."""
        self._taken = set(given)
        self._known: set[str] = set()
        self._waiting: list[str] = []
        self._made = 0
        self._goes_on = False

    def copy(self) -> "Calls":
        return deepcopy(self)

    def ask(self, ids: Sequence[str | None]) -> list[str]:
        """Adds the calls of an assistant's message; returns their ids, with new ones for None."""
        if not self._goes_on:
            self._waiting.clear()
        self._goes_on = True
        named = [id or self._new() for id in ids]
        self._known.update(named)
        self._waiting += named
        return named

    def answer(self, id: str | None) -> str | None:
        """The id of the call that a tool message answers, the next one if `id` is None.

        None if there is no such call.
        """
        self.interrupt()
        if id is None:
            return self._waiting.pop(0) if self._waiting else None
        if id in self._waiting:
            self._waiting.remove(id)
        return id if id in self._known else None

    def interrupt(self) -> None:
        """After another message, the next calls are not asked together with those before."""
        self._goes_on = False

    def _new(self) -> str:
        while True:
            self._made += 1
            id = f"c{self._made:08d}"
            if id not in self._taken:
                return id


def ids_given(*messages: Any) -> list[str]:
    """The ids that the calls in these lists of messages have."""
    every = [message for group in messages if isinstance(group, list) for message in group]
    calls = [_calls_of(message) for message in every if isinstance(message, dict)]
    return [id for group in calls for id in map(_id_of, group) if id is not None]


def _calls_of(message: dict[str, Any]) -> list[Any]:
    calls = message.get("tool_calls")
    return calls if isinstance(calls, list) else []


def _id_of(call: Any) -> str | None:
    id = call.get("id") if isinstance(call, dict) else None
    return id if isinstance(id, str) and id else None


def with_ids(message: dict[str, Any], calls: Calls) -> dict[str, Any]:
    """A checked message in which each call and each answer has an id; without an empty list of calls."""
    rest = {key: value for key, value in message.items() if key not in ("tool_calls", "tool_call_id")}
    if message["role"] == "tool":
        return rest | {"tool_call_id": calls.answer(message.get("tool_call_id") or None)}
    if asked := _calls_of(message):
        ids = calls.ask([_id_of(call) for call in asked])
        return rest | {"tool_calls": [call | {"id": id} for call, id in zip(asked, ids, strict=True)]}
    if message["role"] != "assistant":
        calls.interrupt()
    return rest


def check_calls(message: dict[str, Any], role: str, place: str, calls: Calls, add: Add) -> None:
    """An assistant's tool calls: ids, names, and arguments in JSON."""
    call = message.get("function_call")
    if call is not None:
        _check_function(call, f"{place}.function_call", add)
    asked, path = message.get("tool_calls"), f"{place}.tool_calls"
    if role == "assistant" and asked:
        calls.ask([_id_of(call) for call in _calls_of(message)])
    elif role != "assistant":
        calls.interrupt()
    if asked is None or asked == []:
        return
    if role != "assistant":
        add(path, "tool_call_mismatch", f"a {role} message makes no calls.", "Move them to the assistant.")
    elif not isinstance(asked, list):
        add(path, "data_type", f"tool_calls is {named(asked)}.", "Make it a list.")
    else:
        for i, item in enumerate(asked):
            _check_call(item, f"{path}[{i}]", add)


def _check_call(call: Any, path: str, add: Add) -> None:
    if not isinstance(call, dict):
        add(path, "data_type", f"a call is an object, not {named(call)}.", "Give it a function.")
        return
    if call.get("id") is not None and not isinstance(call["id"], str):
        what = f"the id is {named(call['id'])}."
        add(f"{path}.id", "tool_call_mismatch", what, "Make it a string, or leave it out.")
    if (call.get("type") or "function") != "function":
        add(f"{path}.type", "data_type", f"type {call['type']!r} is unknown.", "Use 'function'.")
    _check_function(call.get("function"), f"{path}.function", add)


def _check_function(call: Any, path: str, add: Add) -> None:
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        add(path, "tool_call_mismatch", "the call names no function.", "Give it name and arguments.")
        return
    arguments = call.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        add(
            f"{path}.arguments",
            "tool_call_mismatch",
            f"the arguments of '{call['name']}' are not a JSON object.",
            'Write them as a string of JSON, such as "{}".',
        )


def check_answer(message: dict[str, Any], role: str, place: str, calls: Calls, add: Add) -> None:
    """A tool message answers an earlier call: the one it names, or else the next that waits."""
    if role == "function" and not message.get("name"):
        add(f"{place}.name", "message_missing_key", "the function message has no name.", "Name the function.")
    id, path = message.get("tool_call_id"), f"{place}.tool_call_id"
    if role != "tool":
        if id is not None:
            add(path, "tool_call_mismatch", f"a {role} message answers no call.", "Leave tool_call_id out.")
    elif id is None or id == "":
        if calls.answer(None) is None:
            add(
                path,
                "tool_call_mismatch",
                "the tool message has no tool_call_id, and no call before it waits for an answer.",
                "Name the call it answers, or add the assistant's call.",
            )
    elif not isinstance(id, str) or calls.answer(id) is None:
        add(
            path,
            "tool_call_mismatch",
            f"no earlier call has the id {id!r}.",
            "Use the id of an assistant's tool call before it.",
        )
