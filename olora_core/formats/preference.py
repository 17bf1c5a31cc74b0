"""Preference pairs: a prompt with a preferred and a rejected answer, under several key names.

The prompt may also stand at the beginning of both answers, as in the best-known sets.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .messages import (
    canonical_messages,
    check_answer_roles,
    check_answer_text,
    check_assistant,
    check_messages,
    check_other_keys,
    check_tools,
)
from .repeated_prompts import NotParted, asks, begins_with, holds_question, part, turns_of
from .report import MAP_COLUMNS, Add, named
from .tool_calls import Calls, ids_given
from .weights import check_whole_weights, refuse_row_weight

SPELLINGS = (
    ("preferred_output", "non_preferred_output"),
    ("preferred_completion", "non_preferred_completion"),
    ("chosen", "rejected"),
)
"""Keys of the preferred and the rejected answer: OpenAI's guide, its older clients, TRL."""
KEYS = ("input", "prompt", "tools", "weight", *(key for spelling in SPELLINGS for key in spelling))
INPUT_KEYS = ("messages", "tools", "parallel_tool_calls", "functions")


@dataclass(frozen=True)
class Preference:
    """One prompt with two answers, whatever their keys were."""

    prompt: Any
    """A string or a list of messages, as are the answers."""
    chosen: Any
    rejected: Any
    tools: Any
    functions: Any


def read_preference(record: Mapping[str, Any]) -> Preference:
    """The preference pair of a record that passed its check."""
    keys = _preference_spelling(record)
    around = record["input"] if "input" in record else record
    pair = _pair(record, keys)
    return Preference(pair.prompt, pair.chosen, pair.rejected, around.get("tools"), around.get("functions"))


def canonical_preference(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record under its common keys, with the prompt apart from the answers."""
    pair = read_preference(record)
    around = {"tools": pair.tools, "functions": pair.functions}
    return _sides(pair) | {key: value for key, value in around.items() if value is not None}


def _sides(pair: Preference) -> dict[str, Any]:
    answers = {"chosen": pair.chosen, "rejected": pair.rejected}
    if isinstance(pair.prompt, str):
        return {"prompt": pair.prompt, **answers}
    calls = Calls(ids_given(pair.prompt, *answers.values()))
    prompt = canonical_messages(pair.prompt, calls)
    return {"prompt": prompt} | {
        key: canonical_messages(messages, calls.copy()) for key, messages in answers.items()
    }


def _preference_spelling(record: Mapping[str, Any]) -> tuple[str, str]:
    return next(spelling for spelling in SPELLINGS if any(key in record for key in spelling))


@dataclass(frozen=True)
class _Pair:
    """A pair whose prompt stands apart, or has been found at the beginning of both answers."""

    prompt: Any
    chosen: Any
    rejected: Any
    is_repeated: bool = False
    """Whether the answers repeated the prompt."""


def _pair(record: Mapping[str, Any], keys: tuple[str, str]) -> _Pair:
    """Raises NotParted if the answers repeat a prompt, but not the same one."""
    chosen, rejected = (record[key] for key in keys)
    if "input" in record:
        return _Pair(record["input"].get("messages"), chosen, rejected)
    prompt, answers = record.get("prompt"), [chosen, rejected]
    if prompt is None and all(isinstance(answer, str) for answer in answers):
        answers = [turns_of(answer) for answer in answers]
    if not all(isinstance(answer, list) for answer in answers):
        return _Pair(prompt, chosen, rejected)
    if prompt is None:
        return _parted(answers) if any(map(holds_question, answers)) else _Pair(None, *answers)
    if not all(map(holds_question, answers)):
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return _Pair(asked, *answers)
    if isinstance(prompt, list) and all(begins_with(answer, prompt) for answer in answers):
        return _Pair(prompt, *(answer[len(prompt) :] for answer in answers), is_repeated=True)
    if not isinstance(prompt, str):
        return _Pair(prompt, *answers)
    pair = _parted(answers)
    if not asks(pair.prompt, prompt):
        raise NotParted(
            "no_common_prompt",
            "the prompt is not a question of the two conversations.",
            "Give it as they do, or leave it out: it is read from what both begin with.",
        )
    return pair


def _parted(answers: list[Any]) -> _Pair:
    parted = part(*answers)
    return _Pair(parted.prompt, parted.chosen, parted.rejected, is_repeated=True)


def check_preference(record: dict[str, Any], add: Add) -> None:
    """Either key of the prompt may be combined with any keys of the answers."""
    refuse_row_weight(record, add)
    keys = _preference_spelling(record)
    missing = [key for key in keys if key not in record]
    for key in missing:
        fix = f"Give each line {' and '.join(keys)}. {MAP_COLUMNS}"
        add(f"$.{key}", "missing_key", f"'{key}' is missing.", fix)
    if missing or not _check_around(record, keys, add):
        return
    try:
        pair = _pair(record, keys)
    except NotParted as problem:
        add("$", problem.code, problem.what, problem.fix)
        return
    if pair.prompt is None and "input" not in record:
        key = "prompt" if keys[0] == "chosen" else "input"
        fix = (
            f"Give each line a prompt, {keys[0]} and {keys[1]}, or begin both answers with it. {MAP_COLUMNS}"
        )
        add(f"$.{key}", "missing_key", f"'{key}' is missing.", fix)
        return
    _check_pair(pair, "$.input.messages" if "input" in record else "$.prompt", keys, add)


def _check_around(record: dict[str, Any], keys: tuple[str, str], add: Add) -> bool:
    """Checks the other keys. False after an error that hides the prompt."""
    if "input" not in record:
        check_other_keys(record, ("prompt", *keys, "tools", "weight"), add)
        check_tools(record, add)
        return True
    check_other_keys(record, ("input", *keys, "weight"), add)
    around = record["input"]
    if not isinstance(around, dict):
        add("$.input", "data_type", f"'input' is {named(around)}.", 'Make it {"messages": […]}.')
        return False
    check_other_keys(around, INPUT_KEYS, add, "$.input")
    check_tools(around, add, "$.input")
    return True


def _check_pair(pair: _Pair, path: str, keys: tuple[str, str], add: Add) -> None:
    """A prompt, which stands at `path`, and its two answers: all strings, or all lists of messages."""
    prompt, answers = pair.prompt, {f"$.{keys[0]}": pair.chosen, f"$.{keys[1]}": pair.rejected}
    values = (prompt, *answers.values())
    if path == "$.prompt" and all(isinstance(value, str) for value in values):
        for place, answer in answers.items():
            _check_text(answer, place, add)
    elif all(isinstance(value, list) for value in values):
        _check_messages(pair, path, answers, add)
    else:
        _name_odd_one(prompt, path, answers, add)
        return
    if pair.chosen == pair.rejected:
        add(
            "$",
            "equal_preference",
            f"{keys[0]} and {keys[1]} are equal, so there is nothing to prefer.",
            "Give two different answers, or leave the line out.",
        )


def _check_text(answer: str, place: str, add: Add) -> None:
    if answer.strip():
        check_answer_text(answer, place, add)
        return
    add(
        place,
        "empty_answer",
        "the answer is empty, so the pair is dropped.",
        "Write it, or leave the line out.",
        "warning",
    )


def _check_messages(pair: _Pair, path: str, answers: dict[str, Any], add: Add) -> None:
    first = len(pair.prompt) if pair.is_repeated else 0
    if not pair.prompt:
        add(
            path,
            "missing_messages_list",
            "the prompt holds no message.",
            'Write [{"role": "user", "content": …}].',
        )
    calls = Calls(ids_given(pair.prompt, *answers.values()))
    check_messages(pair.prompt, next(iter(answers)) if pair.is_repeated else path, add, calls)
    for place, answer in answers.items():
        check_messages(answer, place, add, calls.copy(), first)
        check_assistant(answer, place, add)
        check_answer_roles(answer, place, add)
        check_whole_weights(answer, place, add, first)


def _name_odd_one(prompt: Any, path: str, answers: dict[str, Any], add: Add) -> None:
    messages_only = path != "$.prompt"
    expected = list if messages_only or isinstance(prompt, list) else str
    everything = {path: prompt, **answers}
    place, value = next(((k, v) for k, v in everything.items() if not isinstance(v, expected)))
    add(
        place,
        "data_type",
        f"this is {named(value)}, but the prompt and both answers must be of one kind.",
        "Make all three lists of messages."
        if messages_only
        else "Make all three strings, or all three lists of messages.",
    )
