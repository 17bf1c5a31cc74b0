"""Weights of messages and rows, and reasoning: what is taken over, and what is refused where it stands."""

import io
import json
from typing import Any

import pytest

from olora_core.formats import canonical, validate

from .test_containers import WRITERS, records_in

QUESTION = {"role": "user", "content": "q"}


def chat(*messages: dict[str, Any], **row: Any) -> dict[str, Any]:
    return {"messages": [QUESTION, *messages], **row}


def answer(content: str = "a", **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **keys}


def problems_of(row: dict[str, Any]) -> list[tuple[str | None, str]]:
    report = validate(io.BytesIO(json.dumps(row).encode()))
    assert all(problem.fix for problem in report.errors)
    return [(problem.path, problem.code) for problem in report.errors]


SUPERVISED = {
    "chat": chat(answer()),
    "completion": {"prompt": "a", "completion": "b"},
    "messages": {"prompt": [QUESTION], "completion": [answer()]},
    "text": {"text": "a"},
    "alpaca": {"instruction": "a", "output": "b"},
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
}
PREFERENCES = {
    "preference": {"prompt": "a", "chosen": "b", "rejected": "c"},
    "openai": {
        "input": {"messages": [QUESTION]},
        "preferred_output": [answer("b")],
        "non_preferred_output": [answer("c")],
    },
    "alpaca-preference": {"instruction": "a", "chosen": "b", "rejected": "c"},
    "sharegpt-preference": {
        "conversations": [{"from": "human", "value": "a"}],
        "chosen": {"from": "gpt", "value": "b"},
        "rejected": {"from": "gpt", "value": "c"},
    },
}


@pytest.mark.parametrize("weight", [0, 1, 0.0, 1.0, 0.5, 1e-9])
def test_an_assistants_message_weighs_from_0_to_1(weight: float) -> None:
    row = chat(answer(weight=weight), QUESTION, answer("b"))
    assert problems_of(row) == []
    assert canonical(row) == row


@pytest.mark.parametrize("weight", [-0.1, 1.1, 2, True, False, "1", [1], {}, 10**400])
def test_any_other_weight_is_refused(weight: Any) -> None:
    assert problems_of(chat(answer(weight=weight), answer("b"))) == [
        ("$.messages[1].weight", "invalid_weight")
    ]
    for row in SUPERVISED.values():
        assert problems_of(row | {"weight": weight}) == [("$.weight", "invalid_weight")]


def test_a_weight_that_is_no_number_of_json_is_refused() -> None:
    for data in (
        WRITERS["parquet"]([{"text": "a", "weight": float("nan")}]),
        WRITERS["parquet"]([chat(answer(weight=float("nan")))]),
        b"text,weight\na,high\n",
    ):
        report = validate(io.BytesIO(data))
        assert report.error_count == 1
        assert (report.errors[0].path or "").endswith("weight")


@pytest.mark.parametrize("container", WRITERS)
@pytest.mark.parametrize("format", SUPERVISED)
def test_a_row_has_a_weight_in_every_container(format: str, container: str, tmp_path: Any) -> None:
    rows = [SUPERVISED[format] | {"weight": 0.25}, SUPERVISED[format] | {"weight": 1}]
    data = WRITERS[container](rows)
    report = validate(io.BytesIO(data))
    assert (report.error_count, report.warning_count) == (0, 0), report
    assert [canonical(record)["weight"] for record in records_in(data, tmp_path)] == [0.25, 1]


@pytest.mark.parametrize("weight", [0, 0.0])
def test_a_row_of_weight_0_is_refused(weight: float) -> None:
    assert problems_of(SUPERVISED["text"] | {"weight": weight}) == [("$.weight", "invalid_weight")]


@pytest.mark.parametrize("format", PREFERENCES)
def test_a_preference_has_no_weight(format: str) -> None:
    assert problems_of(PREFERENCES[format]) == []
    assert problems_of(PREFERENCES[format] | {"weight": None}) == []
    assert problems_of(PREFERENCES[format] | {"weight": 0.5}) == [("$.weight", "invalid_weight")]


def test_the_answers_of_a_preference_are_trained_or_not() -> None:
    row = PREFERENCES["openai"]
    assert problems_of(row | {"preferred_output": [answer("b", weight=0), answer("d", weight=1)]}) == []
    assert problems_of(row | {"preferred_output": [answer("b", weight=0.5)]}) == [
        ("$.preferred_output[0].weight", "invalid_weight")
    ]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_taken_over_under_one_key(key: str) -> None:
    row = chat(answer(**{key: "hm"}), QUESTION, answer("b", **{key: ""}))
    assert problems_of(row) == []
    assert canonical(row) == chat(answer(reasoning_content="hm"), QUESTION, answer("b"))
    pair = {"prompt": [QUESTION], "completion": [answer(**{key: "hm"})]}
    assert problems_of(pair) == []
    assert canonical(pair)["completion"] == [answer(reasoning_content="hm")]


def test_reasoning_belongs_to_an_assistant_is_text_and_is_given_once() -> None:
    for role in ("user", "system", "developer"):
        row = {"messages": [{"role": role, "content": "x", "reasoning": "hm"}, QUESTION, answer()]}
        assert problems_of(row) == [("$.messages[0].reasoning", "message_unrecognized_key")]
    assert problems_of({"messages": [QUESTION | {"reasoning": None, "thinking": ""}, answer()]}) == []
    for wrong in (3, ["hm"], {"a": 1}, True):
        assert problems_of(chat(answer(thinking=wrong))) == [("$.messages[1].thinking", "data_type")]
    assert problems_of(chat(answer(reasoning="hm", thinking="hm"))) == []
    assert problems_of(chat(answer(reasoning="hm", thinking="oh"))) == [
        ("$.messages[1].thinking", "message_unrecognized_key")
    ]


@pytest.mark.parametrize("none", [[], None])
def test_an_empty_list_of_calls_is_none(none: Any) -> None:
    row = {"messages": [QUESTION | {"tool_calls": none}, answer(tool_calls=none)]}
    assert problems_of(row) == []
    assert canonical(row) == chat(answer())
    assert problems_of(chat(answer(content=None, tool_calls=none))) == [
        ("$.messages[1].content", "missing_content")
    ]
