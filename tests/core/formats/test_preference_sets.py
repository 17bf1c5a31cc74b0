"""Preference sets as they are published: where the prompt stands, and what is refused."""

import io
import json
from typing import Any

import pytest

from olora_core.formats import canonical, check_for_training, read_preference, validate

from .test_containers import WRITERS, records_in


def said(*texts: str, first: str = "user") -> list[dict[str, str]]:
    """Messages of a user and an assistant in turn."""
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def call(id: str, city: str) -> dict[str, Any]:
    function = {"name": "weather", "arguments": json.dumps({"city": city})}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": id, "type": "function", "function": function}],
    }


SYSTEM = {"role": "system", "content": "Be brief."}
RESULT = {"role": "tool", "content": "sunny", "tool_call_id": "call00001"}
SETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "trl, implicit prompt": (
        {"chosen": said("2+2?", "4"), "rejected": said("2+2?", "5")},
        {"prompt": said("2+2?"), "chosen": said("4", first="a"), "rejected": said("5", first="a")},
    ),
    "several turns after a system prompt": (
        {"chosen": [SYSTEM, *said("a", "b", "c", "d")], "rejected": [SYSTEM, *said("a", "b", "c", "e")]},
        {
            "prompt": [SYSTEM, *said("a", "b", "c")],
            "chosen": said("d", first="a"),
            "rejected": said("e", first="a"),
        },
    ),
    "ultrafeedback binarized": (
        {
            "prompt": "2+2? ",
            "prompt_id": "x1",
            "messages": said("2+2?", "4"),
            "chosen": said("2+2?", "4"),
            "rejected": said("2+2?", "5"),
            "score_chosen": 9.0,
            "score_rejected": 2.5,
        },
        {"prompt": said("2+2?"), "chosen": said("4", first="a"), "rejected": said("5", first="a")},
    ),
    "the first question as the prompt": (
        {"prompt": "a", "chosen": said("a", "b", "c", "d"), "rejected": said("a", "b", "c", "e")},
        {"prompt": said("a", "b", "c"), "chosen": said("d", first="a"), "rejected": said("e", first="a")},
    ),
    "a prompt in text and answers as messages": (
        {"prompt": "2+2?", "chosen": said("4", first="a"), "rejected": said("5", first="a")},
        {"prompt": said("2+2?"), "chosen": said("4", first="a"), "rejected": said("5", first="a")},
    ),
    "a prompt of messages, repeated": (
        {"prompt": said("2+2?"), "chosen": said("2+2?", "4"), "rejected": said("2+2?", "5")},
        {"prompt": said("2+2?"), "chosen": said("4", first="a"), "rejected": said("5", first="a")},
    ),
    "hh-rlhf": (
        {
            "chosen": "\n\nHuman: a?\n\nAssistant: b\n\nb2\n\nHuman: c: d\n\nAssistant: e",
            "rejected": "\n\nHuman: a?\n\nAssistant: b\n\nb2\n\nHuman: c: d\n\nAssistant: f: g",
        },
        {
            "prompt": said("a?", "b\n\nb2", "c: d"),
            "chosen": said("e", first="a"),
            "rejected": said("f: g", first="a"),
        },
    ),
    "hh-rlhf, two turns of one speaker": (
        {
            "chosen": "\n\nHuman: a\n\nHuman: b\n\nAssistant: c",
            "rejected": "Human: a\n\nHuman: b\n\nAssistant: d",
        },
        {"prompt": said("a\n\nb"), "chosen": said("c", first="a"), "rejected": said("d", first="a")},
    ),
    "one answer begins the other": (
        {
            "chosen": [*said("a", "b"), *said("c", first="a")],
            "rejected": said("a", "b"),
        },
        {
            "prompt": said("a"),
            "chosen": [*said("b", first="a"), *said("c", first="a")],
            "rejected": said("b", first="a"),
        },
    ),
    "calls that differ in their results": (
        {
            "chosen": [*said("Rain?"), call("call00001", "Rome"), RESULT, *said("No.", first="a")],
            "rejected": [
                *said("Rain?"),
                call("call00001", "Rome"),
                RESULT | {"content": "wet"},
                *said("Yes.", first="a"),
            ],
        },
        {
            "prompt": said("Rain?"),
            "chosen": [call("call00001", "Rome"), RESULT, *said("No.", first="a")],
            "rejected": [call("call00001", "Rome"), RESULT | {"content": "wet"}, *said("Yes.", first="a")],
        },
    ),
    "a call in the prompt": (
        {
            "chosen": [*said("Rain?"), call("call00001", "Rome"), RESULT, *said("No.", first="a")],
            "rejected": [*said("Rain?"), call("call00001", "Rome"), RESULT, *said("Yes.", first="a")],
        },
        {
            "prompt": [*said("Rain?"), call("call00001", "Rome"), RESULT],
            "chosen": said("No.", first="a"),
            "rejected": said("Yes.", first="a"),
        },
    ),
}


@pytest.mark.parametrize("name", SETS)
def test_the_prompt_is_found_wherever_the_set_has_it(name: str) -> None:
    row, expected = SETS[name]
    report = validate(io.BytesIO(json.dumps(row).encode()))
    assert (report.format, report.error_count) == ("preference", 0), report.errors
    assert {problem.code for problem in report.warnings} <= {"unrecognized_key", "near_empty_answer"}
    assert check_for_training(report, role="training", minimum_rows=1, type="dpo") is None
    assert canonical(row) == expected
    assert canonical(expected) == expected
    for written in (row, expected):
        pair = read_preference(written)
        assert {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected} == expected
    assert validate(io.BytesIO(json.dumps(expected).encode())).error_count == 0


@pytest.mark.parametrize("container", WRITERS)
@pytest.mark.parametrize("name", ["trl, implicit prompt", "ultrafeedback binarized", "hh-rlhf"])
def test_the_sets_load_from_every_container(name: str, container: str, tmp_path: Any) -> None:
    row, expected = SETS[name]
    data = WRITERS[container]([row])
    report = validate(io.BytesIO(data))
    assert report.error_count == 0, report.errors
    assert [canonical(record) for record in records_in(data, tmp_path)] == [expected]


def test_the_columns_that_such_sets_have_besides_are_warnings() -> None:
    row, _ = SETS["ultrafeedback binarized"]
    report = validate(io.BytesIO(json.dumps(row).encode()))
    assert [problem.path for problem in report.warnings] == [
        "$.prompt_id",
        "$.messages",
        "$.score_chosen",
        "$.score_rejected",
    ]


@pytest.mark.parametrize(
    ("row", "path", "code"),
    [
        ({"chosen": said("a", "b"), "rejected": said("c", "d")}, "$", "no_common_prompt"),
        ({"chosen": said("a", "b"), "rejected": said("d", first="a")}, "$", "no_common_prompt"),
        ({"chosen": said("a", "b"), "rejected": said("a", "b")}, "$", "equal_preference"),
        ({"chosen": said("a", "b", "c"), "rejected": said("a", "b", "d")}, "$", "no_common_prompt"),
        ({"chosen": said("a", "b", "c", "d"), "rejected": said("a", "x", "c", "d")}, "$", "no_common_prompt"),
        ({"chosen": said("a"), "rejected": said("a", "b")}, "$", "no_common_prompt"),
        ({"chosen": said("b", first="a"), "rejected": said("c", first="a")}, "$.prompt", "missing_key"),
        (
            {"prompt": "z", "chosen": said("a", "b"), "rejected": said("a", "c")},
            "$",
            "no_common_prompt",
        ),
        (
            {"prompt": "a", "chosen": said("b", first="a"), "rejected": said("b", first="a")},
            "$",
            "equal_preference",
        ),
        (
            {"prompt": said("z"), "chosen": said("a", "b"), "rejected": said("a", "c")},
            "$.chosen[0].role",
            "unrecognized_role",
        ),
        (
            {"chosen": [*said("a"), {"role": "assistant"}], "rejected": said("a", "b")},
            "$.chosen[1].content",
            "message_missing_key",
        ),
        (
            {"chosen": said("a", "b"), "rejected": [*said("a"), {"role": "assistant", "content": 3}]},
            "$.rejected[1].content",
            "data_type",
        ),
        ({"chosen": [3, *said("b", first="a")], "rejected": [4]}, "$.prompt", "missing_key"),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"},
            "$",
            "no_common_prompt",
        ),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: b "},
            "$",
            "equal_preference",
        ),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "b"}, "$.prompt", "missing_key"),
    ],
)
def test_pairs_without_a_common_prompt_are_named(row: dict[str, Any], path: str, code: str) -> None:
    report = validate(io.BytesIO(json.dumps(row).encode()))
    assert report.errors, report
    assert (report.errors[0].path, report.errors[0].code) == (path, code)
    assert all(problem.fix for problem in report.errors)


def test_an_empty_answer_at_the_end_of_a_transcript_is_a_warning() -> None:
    row = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant:"}
    report = validate(io.BytesIO(json.dumps(row).encode()))
    assert report.error_count == 0
    assert [problem.code for problem in report.warnings] == ["empty_answer"]


def test_no_pair_of_values_makes_the_validator_fail() -> None:
    kinds = [None, 3, "", "x", "\n\nHuman: a\n\nAssistant: b", [], [None], [[]], [{}], [{"role": 3}]]
    kinds += [said("a"), said("a", "b"), said("b", first="a"), [SYSTEM], {}]
    for prompt in kinds:
        for chosen in kinds:
            for rejected in kinds:
                row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
                report = validate(io.BytesIO(json.dumps(row).encode()))
                if not report.error_count:
                    assert canonical(canonical(row)) == canonical(row)
