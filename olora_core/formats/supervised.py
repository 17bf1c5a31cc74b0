"""Supervised formats: conversations, prompts with completions, and plain text."""

from typing import Any

from .messages import (
    canonical_messages,
    check_answer_text,
    check_assistant,
    check_messages,
    check_other_keys,
    check_tools,
)
from .report import Add, named
from .tool_calls import Calls, ids_given
from .weights import check_row_weight

CHAT_KEYS = ("messages", "tools", "parallel_tool_calls", "functions", "weight")
COMPLETION_KEYS = ("prompt", "completion", "tools", "weight")
TEXT_KEYS = ("text", "weight")


def check_chat(record: dict[str, Any], add: Add) -> None:
    check_other_keys(record, CHAT_KEYS, add)
    check_row_weight(record, add)
    check_tools(record, add)
    messages = record["messages"]
    if not isinstance(messages, list) or not messages:
        add(
            "$.messages",
            "missing_messages_list",
            f"'messages' must be a list with at least one message, not {named(messages)}.",
            'Write [{"role": "user", "content": …}, {"role": "assistant", "content": …}].',
        )
        return
    check_messages(messages, "$.messages", add)
    check_assistant(messages, "$.messages", add)


def canonical_chat(record: dict[str, Any]) -> dict[str, Any]:
    messages = record["messages"]
    return record | {"messages": canonical_messages(messages, Calls(ids_given(messages)))}


def check_completion(record: dict[str, Any], add: Add) -> None:
    check_other_keys(record, COMPLETION_KEYS, add)
    check_row_weight(record, add)
    check_tools(record, add)
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion.strip():
            add(
                "$.completion",
                "missing_content",
                "the completion is empty, so there is nothing to learn.",
                "Write the answer, or leave the line out.",
            )
        else:
            check_answer_text(completion, "$.completion", add)
        return
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        wrong = "completion" if isinstance(prompt, str | list) else "prompt"
        add(
            f"$.{wrong}",
            "data_type",
            f"prompt is {named(prompt)} and completion is {named(completion)}.",
            "Make both of them strings, or both lists of messages.",
        )
        return
    calls = Calls(ids_given(prompt, completion))
    check_messages(prompt, "$.prompt", add, calls)
    check_messages(completion, "$.completion", add, calls)
    check_assistant(completion, "$.completion", add)
    for i, message in enumerate(completion):
        if isinstance(message, dict) and message.get("role") in ("system", "developer", "user"):
            add(
                f"$.completion[{i}].role",
                "unrecognized_role",
                f"a completion holds no '{message['role']}' message.",
                "Move it to the prompt.",
            )


def canonical_completion(record: dict[str, Any]) -> dict[str, Any]:
    if isinstance(record["prompt"], str):
        return record
    calls = Calls(ids_given(record["prompt"], record["completion"]))
    return record | {key: canonical_messages(record[key], calls) for key in ("prompt", "completion")}


def check_text(record: dict[str, Any], add: Add) -> None:
    """Every token is trained, so that any text but an empty one will do."""
    check_other_keys(record, TEXT_KEYS, add)
    check_row_weight(record, add)
    text = record["text"]
    if not isinstance(text, str):
        add("$.text", "data_type", f"'text' is {named(text)}.", "Make it a string.")
    elif not text.strip():
        add(
            "$.text",
            "missing_content",
            "the text is empty, so there is nothing to learn.",
            "Write it, or leave the line out.",
        )
