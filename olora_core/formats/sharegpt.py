"""ShareGPT: a conversation of turns `{"from": …, "value": …}`, or one with a preference pair."""

import json
from collections.abc import Sequence
from typing import Any

from .messages import canonical_messages, check_answer_text, check_other_keys, check_tools
from .report import Add, named
from .tool_calls import Calls
from .weights import check_message_weight, check_row_weight, refuse_row_weight, row_weight

KEYS = ("conversations", "system", "tools", "weight")
PREFERENCE_KEYS = (*KEYS, "chosen", "rejected")
TURN_KEYS = ("from", "value", "weight")
ASKING, ANSWERING = ("human", "observation"), ("gpt", "function_call")
FOLLOWERS: dict[str | None, tuple[str, ...]] = {
    None: ("system", "human", "gpt"),
    "system": ("human", "gpt"),
    "human": ("gpt", "function_call"),
    "gpt": ("human", "function_call"),
    "function_call": ("observation", "function_call"),
    "observation": ("gpt", "function_call", "observation"),
}
"""Who may speak after whom; after None, first."""
SPEAKERS = ("system", *ASKING, *ANSWERING)
OTHER_NAMES = {"user": "human", "assistant": "gpt", "chatgpt": "gpt", "bot": "gpt", "tool": "observation"}


def check(record: dict[str, Any], add: Add) -> None:
    check_other_keys(record, KEYS, add)
    check_row_weight(record, add)
    _check_around(record, add)
    last = _check_turns(record["conversations"], add)
    if last in ASKING:
        add(
            "$.conversations",
            "example_missing_assistant_message",
            f"the last turn is a {last} turn, which nothing answers.",
            "Add the gpt turn that answers it, or leave the turn out.",
        )
    elif last and all(turn.get("weight") == 0 for turn in record["conversations"] if _answers(turn)):
        add(
            "$.conversations",
            "example_missing_assistant_message",
            "every gpt and function_call turn has weight 0, so there is nothing to learn.",
            "Give at least one of them a weight above 0, or leave the line out.",
        )


def check_preference(record: dict[str, Any], add: Add) -> None:
    check_other_keys(record, PREFERENCE_KEYS, add)
    refuse_row_weight(record, add)
    _check_around(record, add)
    last = _check_turns(record["conversations"], add)
    if last in ANSWERING:
        add(
            "$.conversations",
            "role_order",
            f"the last turn is a {last} turn, but chosen and rejected answer a human one.",
            "Move the last answer to chosen or rejected.",
        )
    for key in ("chosen", "rejected"):
        if record.get(key) is None:
            add(f"$.{key}", "missing_key", f"'{key}' is missing.", "Give each line chosen and rejected.")
        elif _check_turn(record[key], f"$.{key}", add) not in (*ANSWERING, None):
            add(f"$.{key}.from", "role_order", "an answer is a gpt turn.", "Write 'gpt'.")
        elif isinstance(record[key], dict) and record[key].get("weight") not in (None, 1):
            what = "an answer of a preference has no weight."
            add(f"$.{key}.weight", "invalid_weight", what, "Leave the key out.")
    if record.get("chosen") is not None and record.get("chosen") == record.get("rejected"):
        add(
            "$",
            "equal_preference",
            "chosen and rejected are equal, so there is nothing to prefer.",
            "Give two different answers, or leave the line out.",
        )


def _check_around(record: dict[str, Any], add: Add) -> None:
    """Checks the system prompt and the tools."""
    system, tools = record.get("system"), record.get("tools")
    if system is not None and not isinstance(system, str):
        add("$.system", "data_type", f"'system' is {named(system)}.", "Make it a string.")
    if not tools:
        return
    try:
        listed = _tools(tools)
    except ValueError:
        add(
            "$.tools",
            "data_type",
            "'tools' is a string that is not a JSON list.",
            "Write a list of functions.",
        )
    else:
        check_tools({"tools": listed}, add)


def _check_turns(turns: Any, add: Add) -> str | None:
    """Checks the turns and their order. Returns the last speaker, or None after adding an error."""
    if not isinstance(turns, list) or not turns:
        add(
            "$.conversations",
            "missing_messages_list",
            f"'conversations' must be a list with at least one turn, not {named(turns)}.",
            'Write [{"from": "human", "value": …}, {"from": "gpt", "value": …}].',
        )
        return None
    speakers = [_check_turn(turn, f"$.conversations[{i}]", add) for i, turn in enumerate(turns)]
    if None in speakers:
        return None
    if speakers == ["system"]:
        add("$.conversations", "missing_messages_list", "there is only a system turn.", "Add turns.")
        return None
    return speakers[-1] if _are_in_order(turns, speakers, add) else None


def _are_in_order(turns: list[dict[str, Any]], speakers: Sequence[str | None], add: Add) -> bool:
    """Whether each turn may follow the one before; adds an error for the first that may not."""
    before, waiting = None, 0
    for i, speaker in enumerate(speakers):
        path = f"$.conversations[{i}].from"
        if speaker == "observation" and not waiting:
            add(
                path,
                "tool_call_mismatch",
                "an observation answers a call of the function_call turns before it, and none waits for one.",
                "Add the call, or make it a human turn.",
            )
            return False
        if speaker not in FOLLOWERS[before]:
            add(
                path,
                "role_order",
                f"a {speaker} turn where {' or '.join(FOLLOWERS[before])} is expected.",
                "Put the turns in order: a system turn may come first, then human and gpt alternate, with "
                "function_call and observation turns before gpt.",
            )
            return False
        if speaker == "function_call":
            waiting = (waiting if before == "function_call" else 0) + _count_calls(turns[i].get("value"))
        waiting -= speaker == "observation"
        before = speaker
    return True


def _count_calls(value: Any) -> int:
    try:
        return len(_calls(value))
    except (ValueError, TypeError):
        return 1  # its own error is added elsewhere


def _check_turn(turn: Any, place: str, add: Add) -> str | None:
    """Checks one turn. Returns its speaker, or None if unknown."""
    if not isinstance(turn, dict):
        add(place, "data_type", f"a turn is an object, not {named(turn)}.", "Give it from and value.")
        return None
    speaker, value = turn.get("from"), turn.get("value")
    if speaker not in SPEAKERS:
        if "from" not in turn and "role" in turn:
            fix = "Rename 'conversations' to 'messages', if its turns have role and content."
        else:
            fix = f"Use one of {', '.join(SPEAKERS)}."
        if isinstance(speaker, str) and speaker in OTHER_NAMES:
            fix = f"Write '{OTHER_NAMES[speaker]}'."
        what = "the turn has no 'from'." if speaker is None else f"{speaker!r} is not a speaker."
        add(f"{place}.from", "unrecognized_role", what, fix)
        return None
    check_other_keys(turn, TURN_KEYS, add, place)
    _check_weight(turn, place, add)
    if not isinstance(value, str):
        what = "the turn has no value." if value is None else f"the value is {named(value)}."
        add(f"{place}.value", "missing_content", what, "Write its text.")
    elif speaker == "gpt":
        check_answer_text(value, f"{place}.value", add)
    elif speaker == "function_call":
        _check_call(value, f"{place}.value", add)
    return str(speaker)


def _answers(turn: dict[str, Any]) -> bool:
    return turn["from"] in ANSWERING


def _check_weight(turn: dict[str, Any], place: str, add: Add) -> None:
    weight, path = turn.get("weight"), f"{place}.weight"
    if _answers(turn):
        check_message_weight(weight, path, add)
    elif weight is not None and (weight != 0 or isinstance(weight, bool)):
        what = f"a {turn['from']} turn is not trained and has no weight."
        add(path, "invalid_weight", what, "Keep weight for gpt and function_call turns.")


def _check_call(value: str, path: str, add: Add) -> None:
    try:
        calls = _calls(value)
    except ValueError:
        calls = []
    is_call = [isinstance(c, dict) and isinstance(c.get("name"), str) for c in calls]
    if not calls or not all(is_call):
        add(
            path,
            "tool_call_mismatch",
            "the value is not a call in JSON.",
            'Write {"name": …, "arguments": {…}} as a string, or a list of such.',
        )
        return
    for call in calls:
        try:
            arguments = _arguments(call)
        except ValueError:
            arguments = None
        if not isinstance(arguments, dict):
            add(
                path,
                "tool_call_mismatch",
                f"the arguments of '{call['name']}' are not a JSON object.",
                'Write them as an object, such as "arguments": {}.',
            )


def _calls(value: str) -> list[Any]:
    found = json.loads(value)
    return found if isinstance(found, list) else [found]


def _arguments(call: dict[str, Any]) -> Any:
    arguments = call.get("arguments", {})
    return json.loads(arguments) if isinstance(arguments, str) else arguments


def _tools(tools: Any) -> Any:
    """The tools as in a chat record, bare functions wrapped. Raises ValueError for an invalid string."""
    listed = json.loads(tools) if isinstance(tools, str) else tools
    if not isinstance(listed, list):
        if isinstance(tools, str):
            raise ValueError
        return listed
    return [
        {"type": "function", "function": tool} if isinstance(tool, dict) and "name" in tool else tool
        for tool in listed
    ]


def as_chat(record: dict[str, Any]) -> dict[str, Any]:
    messages = canonical_messages(_messages(record), Calls())
    return {"messages": messages} | _with_tools(record) | row_weight(record)


def as_preference(record: dict[str, Any]) -> dict[str, Any]:
    calls = Calls()
    prompt = canonical_messages(_messages(record), calls)
    answers = {
        key: canonical_messages([_message(record[key])], calls.copy()) for key in ("chosen", "rejected")
    }
    return {"prompt": prompt, **answers, **_with_tools(record)}


def _with_tools(record: dict[str, Any]) -> dict[str, Any]:
    return {"tools": _tools(record["tools"])} if record.get("tools") else {}


def _messages(record: dict[str, Any]) -> list[dict[str, Any]]:
    turns = record["conversations"]
    messages: list[dict[str, Any]] = []
    if record.get("system") and turns[0]["from"] != "system":
        messages.append({"role": "system", "content": record["system"]})
    for turn in turns:
        message = _message(turn)
        if turn["from"] == "function_call" and _may_join(messages, message):
            before = messages.pop()
            message = before | {"tool_calls": before.get("tool_calls", []) + message["tool_calls"]}
        messages.append(message)
    return messages


def _may_join(before: list[dict[str, Any]], message: dict[str, Any]) -> bool:
    """Whether calls belong to the assistant's message before them, which has the same weight."""
    if not before or before[-1]["role"] != "assistant":
        return False
    return bool(before[-1].get("weight", 1) == message.get("weight", 1))


def _message(turn: dict[str, Any]) -> dict[str, Any]:
    value = turn["value"]
    weight = {"weight": turn["weight"]} if _answers(turn) and turn.get("weight") is not None else {}
    match turn["from"]:
        case "function_call":
            calls = [
                {"type": "function", "function": {"name": call["name"], "arguments": _arguments(call)}}
                for call in _calls(value)
            ]
            return {"role": "assistant", "content": None, "tool_calls": calls} | weight
        case "observation":
            return {"role": "tool", "content": value}
        case speaker:
            role = {"human": "user", "gpt": "assistant"}.get(speaker, speaker)
            return {"role": role, "content": value} | weight
