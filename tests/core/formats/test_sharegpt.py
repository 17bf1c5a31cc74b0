"""ShareGPT: which turn may follow which, what becomes of calls and text together, and weights of turns."""

import io
import json
from typing import Any

import pytest

from olora_core.formats import canonical, validate

CALL = '{"name": "weather", "arguments": {"city": "Rome"}}'
TWO = '[{"name": "weather", "arguments": {"city": "Rome"}}, {"name": "time", "arguments": "{}"}]'


def turns(*spoken: tuple[str, str] | tuple[str, str, float]) -> dict[str, Any]:
    """Turns of a speaker, a value and perhaps a weight."""
    keys = ("from", "value", "weight")
    return {"conversations": [dict(zip(keys, turn, strict=False)) for turn in spoken]}


def errors_of(row: dict[str, Any]) -> list[tuple[str | None, str]]:
    report = validate(io.BytesIO(json.dumps(row).encode()))
    assert not [problem for problem in report.warnings if problem.code == "unrecognized_key"]
    assert all(problem.fix for problem in report.errors)
    return [(problem.path, problem.code) for problem in report.errors]


def written(row: dict[str, Any]) -> list[str]:
    """The messages in short: role, text, called functions and the position of the answered call."""
    assert errors_of(row) == []
    messages = canonical(row)["messages"]
    assert errors_of({"messages": messages}) == []
    ids = [call["id"] for message in messages for call in message.get("tool_calls", [])]
    lines = []
    for message in messages:
        calls = [call["function"]["name"] for call in message.get("tool_calls", [])]
        answered = [str(ids.index(message["tool_call_id"]))] if "tool_call_id" in message else []
        lines.append(" ".join([message["role"], message["content"] or "-", *calls, *answered]))
    return lines


def test_two_observations_answer_parallel_calls_in_their_order() -> None:
    row = turns(
        ("human", "q"), ("function_call", TWO), ("observation", "a"), ("observation", "b"), ("gpt", "c")
    )
    assert written(row) == ["user q", "assistant - weather time", "tool a 0", "tool b 1", "assistant c"]


def test_one_observation_may_answer_parallel_calls() -> None:
    row = turns(("human", "q"), ("function_call", TWO), ("observation", "a and b"), ("gpt", "c"))
    assert written(row) == ["user q", "assistant - weather time", "tool a and b 0", "assistant c"]


def test_calls_in_several_turns_are_one_message() -> None:
    row = turns(
        *(("human", "q"), ("function_call", CALL), ("function_call", CALL)),
        *(("observation", "a"), ("observation", "b"), ("function_call", CALL), ("observation", "d")),
        ("gpt", "c"),
    )
    assert written(row) == [
        *("user q", "assistant - weather weather", "tool a 0", "tool b 1"),
        *("assistant - weather", "tool d 2", "assistant c"),
    ]


def test_text_before_a_call_is_in_the_message_of_the_call() -> None:
    row = turns(("human", "q"), ("gpt", "Wait."), ("function_call", CALL), ("observation", "a"), ("gpt", "c"))
    assert written(row) == ["user q", "assistant Wait. weather", "tool a 0", "assistant c"]


@pytest.mark.parametrize("system", [[], [("system", "s")]])
def test_an_assistant_may_greet_first(system: list[tuple[str, str]]) -> None:
    row = turns(*system, ("gpt", "Hello."), ("human", "q"), ("gpt", "a"))
    assert written(row) == [
        *(["system s"] if system else []),
        *("assistant Hello.", "user q", "assistant a"),
    ]


@pytest.mark.parametrize(
    ("row", "path", "code"),
    [
        (turns(("human", "q"), ("function_call", CALL), ("gpt", "a")), "[2].from", "role_order"),
        (turns(("function_call", CALL), ("observation", "a"), ("gpt", "a")), "[0].from", "role_order"),
        (
            turns(("human", "q"), ("gpt", "a"), ("gpt", "b")),
            "[2].from",
            "role_order",
        ),
        (
            turns(
                ("human", "q"),
                ("function_call", TWO),
                *[("observation", "a")] * 3,
                ("gpt", "a"),
            ),
            "[4].from",
            "tool_call_mismatch",
        ),
        (
            turns(
                *(("human", "q"), ("function_call", TWO), ("observation", "a"), ("gpt", "b")),
                *(("human", "q"), ("function_call", CALL), ("observation", "a"), ("observation", "b")),
                ("gpt", "c"),
            ),
            "[7].from",
            "tool_call_mismatch",
        ),
        (turns(("observation", "a"), ("gpt", "b")), "[0].from", "tool_call_mismatch"),
        (turns(("gpt", "a"), ("human", "b")), "", "example_missing_assistant_message"),
        (
            turns(("human", "q"), ("function_call", CALL), ("observation", "a"), ("human", "b")),
            "[3].from",
            "role_order",
        ),
        (turns(("system", "s"), ("system", "s"), ("gpt", "b")), "[1].from", "role_order"),
    ],
)
def test_turns_out_of_order_are_named(row: dict[str, Any], path: str, code: str) -> None:
    assert errors_of(row) == [(f"$.conversations{path}", code)]


@pytest.mark.parametrize("weight", [0, 1, 0.5])
def test_the_weight_of_a_turn_is_that_of_its_message(weight: float) -> None:
    row = turns(("human", "q", 0), ("gpt", "a", weight), ("human", "r"), ("gpt", "b"))
    assert errors_of(row) == []
    messages = canonical(row)["messages"]
    assert [message.get("weight") for message in messages] == [None, weight, None, None]


def test_a_call_joins_the_text_before_it_if_they_weigh_the_same() -> None:
    def messages(text: tuple[Any, ...], call: tuple[Any, ...]) -> list[Any]:
        row = turns(
            *(("human", "q"), ("gpt", "Wait.", *text), ("function_call", CALL, *call)),
            *(("observation", "a"), ("gpt", "c")),
        )
        assert errors_of(row) == []
        return [
            (m["content"], len(m.get("tool_calls", [])), m.get("weight")) for m in canonical(row)["messages"]
        ][1:-2]

    assert messages((0.5,), (0.5,)) == [("Wait.", 1, 0.5)]
    assert messages((), (1,)) == [("Wait.", 1, None)]
    assert messages((0,), ()) == [("Wait.", 0, 0), (None, 1, None)]


@pytest.mark.parametrize(
    ("row", "path", "code"),
    [
        (turns(("human", "q"), ("gpt", "a", 2)), "[1].weight", "invalid_weight"),
        (turns(("human", "q"), ("gpt", "a", True)), "[1].weight", "invalid_weight"),
        (turns(("human", "q", 1), ("gpt", "a")), "[0].weight", "invalid_weight"),
        (turns(("human", "q"), ("gpt", "a", 0)), "", "example_missing_assistant_message"),
    ],
)
def test_a_weight_that_cannot_be_honoured_is_named(row: dict[str, Any], path: str, code: str) -> None:
    assert errors_of(row) == [(f"$.conversations{path}", code)]


def test_the_answers_of_a_preference_have_no_weight() -> None:
    row = turns(("human", "q"), ("gpt", "a", 0.5), ("human", "r")) | {
        "chosen": {"from": "gpt", "value": "b", "weight": 1},
        "rejected": {"from": "gpt", "value": "c"},
    }
    assert errors_of(row) == []
    row["rejected"]["weight"] = 0.5
    assert errors_of(row) == [("$.rejected.weight", "invalid_weight")]


def test_the_answers_of_a_preference_may_be_calls_after_others() -> None:
    row = turns(("human", "q"), ("function_call", CALL), ("observation", "a")) | {
        "chosen": {"from": "function_call", "value": TWO},
        "rejected": {"from": "gpt", "value": "c"},
    }
    assert errors_of(row) == []
    made = canonical(row)
    ids = [call["id"] for m in (*made["prompt"], *made["chosen"]) for call in m.get("tool_calls", [])]
    assert len(set(ids)) == 3
    assert made["prompt"][2]["tool_call_id"] == ids[0]
