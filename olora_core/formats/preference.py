"""Preference pairs: a prompt with a preferred and a rejected answer, under several key names."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .messages import (
    call_ids,
    check_answer_roles,
    check_answer_text,
    check_assistant,
    check_messages,
    check_other_keys,
    check_tools,
)
from .report import Add, named
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
    better, worse = _preference_spelling(record)
    around = record["input"] if "input" in record else record
    prompt = around["messages"] if "input" in record else record["prompt"]
    return Preference(prompt, record[better], record[worse], around.get("tools"), around.get("functions"))


def _preference_spelling(record: Mapping[str, Any]) -> tuple[str, str]:
    return next(spelling for spelling in SPELLINGS if any(key in record for key in spelling))


def check_preference(record: dict[str, Any], add: Add) -> None:
    """Either key of the prompt may be combined with any keys of the answers."""
    refuse_row_weight(record, add)
    better, worse = _preference_spelling(record)
    missing = [key for key in (better, worse) if key not in record]
    if "input" not in record and "prompt" not in record:
        missing.insert(0, "prompt" if better == "chosen" else "input")
    for key in missing:
        add(
            f"$.{key}",
            "missing_key",
            f"'{key}' is missing.",
            f"Give each line a prompt, {better} and {worse}.",
        )
    if missing:
        return
    if "input" in record:
        check_other_keys(record, ("input", "weight", better, worse), add)
        around, path = record["input"], "$.input.messages"
        if not isinstance(around, dict):
            add("$.input", "data_type", f"'input' is {named(around)}.", 'Make it {"messages": […]}.')
            return
        check_other_keys(around, INPUT_KEYS, add, "$.input")
        check_tools(around, add, "$.input")
        prompt = around.get("messages")
    else:
        check_other_keys(record, ("prompt", better, worse, "tools", "weight"), add)
        check_tools(record, add)
        prompt, path = record["prompt"], "$.prompt"
    _check_pair(prompt, path, {f"$.{key}": record[key] for key in (better, worse)}, add)


def _check_pair(prompt: Any, path: str, answers: dict[str, Any], add: Add) -> None:
    """A prompt and its two answers, by path: all strings, or all lists of messages."""
    values, messages_only = list(answers.values()), path != "$.prompt"
    if not messages_only and all(isinstance(value, str) for value in (prompt, *values)):
        for place, answer in answers.items():
            if not answer.strip():
                add(
                    place,
                    "empty_answer",
                    "the answer is empty, so the pair is dropped.",
                    "Write it, or leave the line out.",
                    "warning",
                )
            else:
                check_answer_text(answer, place, add)
    elif all(isinstance(value, list) for value in (prompt, *values)):
        if not prompt:
            add(
                path,
                "missing_messages_list",
                "the prompt holds no message.",
                'Write [{"role": "user", "content": …}].',
            )
        check_messages(prompt, path, add)
        for place, answer in answers.items():
            check_messages(answer, place, add, call_ids(prompt))
            check_assistant(answer, place, add)
            check_answer_roles(answer, place, add)
            check_whole_weights(answer, place, add)
    else:
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
        return
    if values[0] == values[1]:
        better, worse = (place.removeprefix("$.") for place in answers)
        add(
            "$",
            "equal_preference",
            f"{better} and {worse} are equal, so there is nothing to prefer.",
            "Give two different answers, or leave the line out.",
        )
