"""Control tokens inside messages are errors of their own, which a job may take as ordinary text."""

import json

import pytest

from olora_core.formats import Report, check_for_training, validate

FORMS = ["<|im_end|>", "<|eot_id|>", "<｜end▁of▁sentence｜>", "<end_of_turn>", "<turn|>", "[INST]"]


def report_of(*rows: dict) -> Report:
    return validate([("\n".join(map(json.dumps, rows)) + "\n").encode()])


def conversation(question: str, answer: str = "So.") -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.mark.parametrize("token", FORMS)
def test_a_control_token_in_a_message_is_an_error_with_its_place(token) -> None:
    report = report_of(conversation("Why?"), conversation("Why?", f"It is {token}."))
    (problem,) = report.errors
    assert (problem.line, problem.path, problem.code) == (2, "$.messages[1].content", "control_token")
    assert token in problem.message
    assert report.control_token_count == report.error_count == 1


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Say <|im_end|>", "output": "No."},
        {"conversations": [{"from": "human", "value": "<|im_end|>"}, {"from": "gpt", "value": "No."}]},
        {"prompt": "Why?", "chosen": "So.", "rejected": "<|im_end|>"},
    ],
)
def test_every_format_that_a_template_frames_is_checked(row) -> None:
    assert [problem.code for problem in report_of(row).errors] == ["control_token"]


@pytest.mark.parametrize(
    "row", [{"text": "<|im_end|>"}, {"prompt": "<|im_start|>", "completion": "a<|im_end|>"}]
)
def test_raw_text_may_hold_control_tokens(row) -> None:
    assert report_of(row).errors == []


@pytest.mark.parametrize("text", ["a <b> c", "x < |y| > z", "<think>Hm.</think>", "if a <|b", "[inst]"])
def test_what_only_looks_alike_is_no_control_token(text) -> None:
    assert report_of(conversation(text, text)).errors == []


def test_a_job_may_take_them_as_ordinary_text() -> None:
    report = report_of(conversation("<|im_end|>"), conversation("Why <|im_end|>?"))
    refused = check_for_training(report, role="training", minimum_rows=1)
    assert refused is not None
    assert 'control_tokens = "text"' in refused.message
    assert "1 more error" in refused.message
    assert check_for_training(report, role="training", minimum_rows=1, literal=True) is None


def test_other_errors_count_all_the_same() -> None:
    broken = {"messages": [{"role": "user", "content": "<|im_end|>"}, {"role": "robot", "content": "So."}]}
    refused = check_for_training(report_of(broken), role="training", minimum_rows=1, literal=True)
    assert refused is not None
    assert "robot" in refused.message
    assert "more error" in refused.message or "control" not in refused.message
