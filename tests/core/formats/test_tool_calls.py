"""Tool calls without ids get some, and tool messages without one answer the calls in their order."""

import io
import json
import re
from typing import Any

import pytest

from olora_core.formats import canonical, validate
from olora_core.formats.tool_calls import Calls

QUESTION = {"role": "user", "content": "Rain?"}
DONE = {"role": "assistant", "content": "No."}


def asks(*cities: str, ids: tuple[str | None, ...] = ()) -> dict[str, Any]:
    """An assistant's message with a call for each city."""
    given = [*ids, *[None] * len(cities)]
    calls = [
        {
            **({"id": id} if id is not None else {}),
            "type": "function",
            "function": {"name": "weather", "arguments": {"city": city}},
        }
        for city, id in zip(cities, given, strict=False)
    ]
    return {"role": "assistant", "tool_calls": calls}


def tool(content: str, id: str | None = None) -> dict[str, Any]:
    return {"role": "tool", "content": content} | ({"tool_call_id": id} if id is not None else {})


def errors_of(*messages: dict[str, Any]) -> list[tuple[str | None, str]]:
    report = validate(io.BytesIO(json.dumps({"messages": messages}).encode()))
    assert all(problem.fix for problem in report.errors)
    return [(problem.path, problem.code) for problem in report.errors]


def answered(*messages: dict[str, Any]) -> dict[str, str]:
    """The city that each tool message is about, by its content."""
    assert errors_of(*messages) == []
    made = canonical({"messages": list(messages)})["messages"]
    calls = {
        call["id"]: call["function"]["arguments"]["city"] for m in made for call in m.get("tool_calls", [])
    }
    return {m["content"]: calls[m["tool_call_id"]] for m in made if m["role"] == "tool"}


def ids_of(*messages: dict[str, Any]) -> list[str]:
    made = canonical({"messages": list(messages)})["messages"]
    return [call["id"] for message in made for call in message.get("tool_calls", [])]


def test_parallel_calls_are_answered_in_their_order() -> None:
    conversation = (QUESTION, asks("Rome", "Oslo"), tool("sunny"), tool("wet"), DONE)
    assert answered(*conversation) == {"sunny": "Rome", "wet": "Oslo"}


def test_calls_of_one_message_after_another_wait_together() -> None:
    conversation = (QUESTION, asks("Rome"), asks("Oslo"), tool("sunny"), tool("wet"), DONE)
    assert answered(*conversation) == {"sunny": "Rome", "wet": "Oslo"}


@pytest.mark.parametrize("between", [QUESTION, tool("sunny")])
def test_a_call_that_was_never_answered_waits_no_longer(between: dict[str, Any]) -> None:
    conversation = (QUESTION, asks("Bonn", "Rome"), between, asks("Oslo"), tool("wet"), DONE)
    assert answered(*conversation)["wet"] == "Oslo"


def test_ids_that_are_given_stay_and_may_be_mixed_with_none() -> None:
    conversation = (
        QUESTION,
        asks("Rome", "Oslo", "Bonn", ids=("call_a", None, "call_b")),
        tool("cold", "call_b"),
        tool("sunny"),
        tool("wet"),
        DONE,
    )
    assert answered(*conversation) == {"cold": "Bonn", "sunny": "Rome", "wet": "Oslo"}
    first, second, third = ids_of(*conversation)
    assert (first, third) == ("call_a", "call_b")
    assert second not in ("call_a", "call_b")
    given = [QUESTION, asks("Rome", ids=("x",)), tool("sunny", "x"), DONE]
    assert canonical({"messages": given}) == {"messages": given}


def test_new_ids_are_nine_letters_and_digits_and_no_id_that_the_row_has() -> None:
    taken = ids_of(QUESTION, asks("Rome", "Oslo"))
    conversation = (
        *(QUESTION, asks("Rome", "Oslo"), tool("a"), tool("b")),
        *(QUESTION, asks("Bonn", ids=(taken[0],)), tool("c", taken[0]), DONE),
    )
    made = ids_of(*conversation)
    assert len(set(made)) == 3
    assert made[2] == taken[0]
    assert all(re.fullmatch("[a-zA-Z0-9]{9}", id) for id in made)
    assert ids_of(*conversation) == made
    many = Calls().ask([None] * 100_001)
    assert len(set(many)) == 100_001
    assert {len(id) for id in many} == {9}


@pytest.mark.parametrize("none", [None, ""])
def test_an_empty_id_is_none(none: str | None) -> None:
    call = asks("Rome")
    call["tool_calls"][0]["id"] = none
    answer = {"role": "tool", "content": "sunny", "tool_call_id": none}
    assert answered(QUESTION, call, answer, DONE) == {"sunny": "Rome"}


@pytest.mark.parametrize(
    ("messages", "place"),
    [
        ([QUESTION, tool("a"), DONE], 1),
        ([QUESTION, asks("Rome"), tool("a"), tool("b"), DONE], 3),
        ([QUESTION, asks("Rome"), tool("a", "call_1"), DONE], 2),
        ([QUESTION, asks("Rome", ids=("x",)), tool("a", "x"), tool("b"), DONE], 3),
    ],
)
def test_a_tool_message_without_a_call_is_named(messages: list[dict[str, Any]], place: int) -> None:
    assert errors_of(*messages) == [(f"$.messages[{place}].tool_call_id", "tool_call_mismatch")]


def test_the_answers_of_a_prompts_calls_may_come_in_the_completion() -> None:
    row = {"prompt": [QUESTION, asks("Rome", "Oslo")], "completion": [tool("sunny"), tool("wet"), DONE]}
    assert validate(io.BytesIO(json.dumps(row).encode())).error_count == 0
    made = canonical(row)
    ids = [call["id"] for call in made["prompt"][1]["tool_calls"]]
    assert [message.get("tool_call_id") for message in made["completion"]] == [*ids, None]


@pytest.mark.parametrize("prompt", ["prompt", "input"])
def test_both_answers_of_a_preference_go_on_from_the_same_calls(prompt: str) -> None:
    asked = [QUESTION, asks("Rome")]
    around = {"prompt": asked} if prompt == "prompt" else {"input": {"messages": asked}}
    row = around | {
        "preferred_output": [tool("sunny"), asks("Oslo"), tool("wet"), DONE],
        "non_preferred_output": [tool("sunny"), DONE | {"content": "Yes."}],
    }
    assert validate(io.BytesIO(json.dumps(row).encode())).error_count == 0
    made = canonical(row)
    (id,) = [call["id"] for call in made["prompt"][1]["tool_calls"]]
    assert made["chosen"][0]["tool_call_id"] == made["rejected"][0]["tool_call_id"] == id
    assert made["chosen"][1]["tool_calls"][0]["id"] == made["chosen"][2]["tool_call_id"] != id
    assert validate(io.BytesIO(json.dumps(made).encode())).error_count == 0
