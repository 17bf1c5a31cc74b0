"""Training files: what is accepted, and that every error is found with its line, place and remedy."""

import io
import json
import tracemalloc
from pathlib import Path

import pytest

from olora_core.errors import DataError
from olora_core.formats import (
    MAX_ROW_BYTES,
    Report,
    canonical,
    check_for_training,
    detect_format,
    read_records,
    validate,
)
from olora_core.formats.duplicates import Seen

CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
CALL = {"id": "c1", "type": "function", "function": {"name": "sum", "arguments": '{"a": 1}'}}


def report_of(*rows: object, end: str = "\n") -> Report:
    """Validates rows, each a JSON value or a raw line."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    return validate(io.BytesIO((end.join(lines) + end).encode()))


def only_error(*rows: object) -> tuple[int | None, str | None, str]:
    report = report_of(*rows)
    assert report.error_count == 1, report.errors
    return report.errors[0].line, report.errors[0].path, report.errors[0].code


def answer(**message: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", **message}]}


def test_a_good_chat_file_has_no_findings() -> None:
    report = report_of(CHAT, answer(content="sure"))
    assert (report.format, report.rows, report.error_count, report.warning_count, report.note_count) == (
        "chat",
        2,
        0,
        0,
        0,
    )


def test_tools_weights_names_and_text_parts_are_accepted() -> None:
    row = {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "Add."}]},
            {"role": "user", "content": "1+1", "name": "ann"},
            {"role": "assistant", "content": None, "tool_calls": [CALL], "weight": 0, "refusal": None},
            {"role": "tool", "content": "2", "tool_call_id": "c1"},
            {"role": "assistant", "content": "2", "weight": 1},
        ],
        "tools": [{"type": "function", "function": {"name": "sum", "parameters": {}}}],
        "parallel_tool_calls": False,
    }
    report = report_of(row)
    assert (report.error_count, report.warning_count) == (0, 0), report


def test_byte_order_mark_crlf_blank_lines_and_developer_are_notes() -> None:
    developer = {"messages": [{"role": "developer", "content": "x"}, *CHAT["messages"]]}
    text = "\ufeff" + json.dumps(CHAT) + "\r\n\r\n" + json.dumps(developer) + "\r\n\n"
    report = validate(io.BytesIO(text.encode()))
    assert report.error_count == 0
    assert report.rows == 2
    assert {n.code for n in report.notes} == {"byte_order_mark", "crlf", "blank_line", "developer_role"}


def test_lines_are_counted_as_in_the_original_file() -> None:
    assert only_error(CHAT, "", "   ", "nonsense", CHAT)[0] == 4


def test_the_last_line_needs_no_line_end() -> None:
    report = validate([json.dumps(CHAT).encode()])
    assert (report.rows, report.error_count) == (1, 0)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_chunks_of_any_size_give_the_same_report(size: int) -> None:
    data = ("\ufeff" + json.dumps(CHAT) + "\r\n" + "[1]\n" + json.dumps({"messages": []}) + "\n").encode()
    chunks = [data[i : i + size] for i in range(0, len(data), size)]
    assert validate(chunks) == validate(io.BytesIO(data))


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_the_first_message_is_shaped_as_openais(end: str) -> None:
    report = report_of("[1, 2]", CHAT, end=end)
    assert report.fatal is not None
    assert report.fatal.message == (
        "Expected file to have JSONL format, where every line is a JSON dictionary. "
        'Line 1 is not a dictionary (HINT: line starts with: "[1, 2]").'
    )
    assert "without brackets" in report.fatal.fix


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "empty"),
        (b"\n\r\n  \n", "empty"),
        (b"\xef\xbb\xbf", "empty"),
        (b'{"text": "\xff"}\n', "not UTF-8"),
        ('{"text": "a"}\n'.encode("utf-16"), "UTF-16"),
        (b"PK\x03\x04rest", "zip"),
        (b"\x1f\x8b\x08\x00", "gzip"),
        (b"PAR1....", "parquet"),
        (b'{"text": NaN}\n', "NaN"),
        (b'{"text": -Infinity}\n', "-Infinity"),
        (b'{"text": 1e999}\n', "1e999"),
        (b'{"text": "\\ud800"}\n', "surrogate"),
        (b"[" * 100_000 + b"\n", "nested"),
        (b'{"text": ' + b"9" * 5000 + b"}\n", "digits"),
        (b"prompt,completion\n", "not a dictionary"),
        (b"question,reply\na\n", "not a dictionary"),
        (b"[]", "not a dictionary"),
        (b'{\n  "messages": []\n}\n', "not a dictionary"),
        (b'"text"\n', "not a dictionary"),
    ],
)
def test_a_file_that_is_not_jsonl_is_fatal(data: bytes, says: str) -> None:
    report = validate(io.BytesIO(data))
    assert report.fatal is not None
    assert says in report.fatal.sentence
    assert report.fatal.fix
    assert report.fatal in report.errors


def test_a_whole_surrogate_pair_is_a_character() -> None:
    assert report_of('{"text": "\\ud83d\\ude00"}').error_count == 0


def test_a_pretty_printed_file_is_told_so() -> None:
    report = validate(io.BytesIO(json.dumps(CHAT, indent=2).encode()))
    assert report.fatal is not None
    assert "pretty-printed" in report.fatal.fix


def test_a_very_long_line_is_named_and_takes_no_memory() -> None:
    def chunks():
        yield json.dumps(CHAT).encode() + b'\n{"text": "'
        for _ in range(100):
            yield b"x" * 2**20
        yield b'"}\n' + json.dumps(CHAT).encode()

    tracemalloc.start()
    report = validate(chunks())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report.fatal is not None
    assert report.fatal.line == 2
    assert "16 MB" in report.fatal.message
    assert report.rows == 3
    assert peak < 3 * MAX_ROW_BYTES


def test_a_record_in_no_known_format_is_told_what_is_expected() -> None:
    """At most eight of its columns are named."""
    (problem,) = report_of({"question": "a", "answer": "b"}).errors
    assert problem.message == (
        "Line 1: no known format: found columns question, answer; expected messages, or prompt + completion, "
        "or instruction + output."
    )
    (problem,) = report_of({f"c{i}": i for i in range(9)}).errors
    assert "found columns c0, c1, c2, c3, c4, c5, c6, c7, …; expected" in problem.message
    (problem,) = report_of({}).errors
    assert "found no columns; expected" in problem.message


def test_every_error_is_counted_and_the_first_fifty_kept() -> None:
    report = report_of(*[{"messages": []}] * 120)
    assert report.error_count == 120
    assert [p.line for p in report.errors] == list(range(1, 51))
    assert report.fatal is None


@pytest.mark.parametrize(
    ("row", "path", "code"),
    [
        ({"messages": "x"}, "$.messages", "missing_messages_list"),
        ({"messages": []}, "$.messages", "missing_messages_list"),
        ({"mesages": []}, "$", "missing_messages_list"),
        ({"foo": 1}, "$", "missing_messages_list"),
        ({"messages": ["x", *CHAT["messages"]]}, "$.messages[0]", "data_type"),
        ({"messages": [{"content": "x"}, *CHAT["messages"]]}, "$.messages[0].role", "message_missing_key"),
        (
            {"messages": [{"role": "asistant", "content": "x"}, *CHAT["messages"]]},
            "$.messages[0].role",
            "unrecognized_role",
        ),
        (
            {"messages": [{"role": 3, "content": "x"}, *CHAT["messages"]]},
            "$.messages[0].role",
            "unrecognized_role",
        ),
        ({"messages": [{"role": "user"}, *CHAT["messages"]]}, "$.messages[0].content", "message_missing_key"),
        (answer(content=None), "$.messages[1].content", "missing_content"),
        (answer(content=3), "$.messages[1].content", "data_type"),
        (answer(content=[{"type": "image_url"}]), "$.messages[1].content[0]", "unsupported_content"),
        (answer(content="x", contents="y"), "$.messages[1].contents", "message_unrecognized_key"),
        (answer(content="x", name=1), "$.messages[1].name", "data_type"),
        (answer(content="x", weight=2), "$.messages[1].weight", "invalid_weight"),
        (answer(content="x", weight=True), "$.messages[1].weight", "invalid_weight"),
        (answer(content="x", weight=0), "$.messages", "example_missing_assistant_message"),
        ({"messages": [{"role": "user", "content": "x"}]}, "$.messages", "example_missing_assistant_message"),
        (
            {"messages": [{"role": "user", "content": "x", "weight": 1}, CHAT["messages"][1]]},
            "$.messages[0].weight",
            "invalid_weight",
        ),
        (
            {"messages": [*CHAT["messages"], {"role": "tool", "content": "2"}]},
            "$.messages[2].tool_call_id",
            "tool_call_mismatch",
        ),
        (
            {"messages": [*CHAT["messages"], {"role": "tool", "content": "2", "tool_call_id": "c9"}]},
            "$.messages[2].tool_call_id",
            "tool_call_mismatch",
        ),
        (
            answer(tool_calls=[{**CALL, "function": {"name": "sum", "arguments": "{a"}}]),
            "$.messages[1].tool_calls[0].function.arguments",
            "tool_call_mismatch",
        ),
        (
            {"messages": [*CHAT["messages"], {"role": "tool", "content": "2", "tool_call_id": {}}]},
            "$.messages[2].tool_call_id",
            "tool_call_mismatch",
        ),
        (answer(tool_calls=[{"id": "c1"}]), "$.messages[1].tool_calls[0].function", "tool_call_mismatch"),
        (answer(tool_calls=[{**CALL, "id": 3}]), "$.messages[1].tool_calls[0].id", "tool_call_mismatch"),
        ({**CHAT, "tools": [{"name": "sum"}]}, "$.tools[0]", "data_type"),
        ({"prompt": "a"}, "$.completion", "missing_key"),
        ({"prompt": "a", "completion": ""}, "$.completion", "missing_content"),
        ({"prompt": "a", "completion": []}, "$.completion", "data_type"),
        ({"prompt": 3, "completion": "b"}, "$.prompt", "data_type"),
        (
            {"prompt": [{"role": "user", "content": "x"}], "completion": [{"role": "user", "content": "y"}]},
            None,
            None,
        ),
    ],
)
def test_an_error_names_line_path_code_and_remedy(row: object, path: str | None, code: str | None) -> None:
    report = report_of("", row)
    if code is None:
        assert [p.code for p in report.errors] == ["example_missing_assistant_message", "unrecognized_role"]
        return
    assert report.error_count == 1, report.errors
    problem = report.errors[0]
    assert (problem.line, problem.path, problem.code) == (2, path, code)
    assert problem.message.startswith("Line 2")
    assert problem.fix


def test_no_value_anywhere_makes_the_validator_fail() -> None:
    """Each known key of each format is given a value of every kind."""
    kinds = [None, True, 0, 1.5, "", "x", [], [None], [{}], {}, {"function": None}]
    message = {
        "role": "assistant",
        "content": "x",
        "name": "n",
        "weight": 1,
        "tool_calls": [CALL],
        "tool_call_id": "c1",
        "function_call": CALL["function"],
    }
    rows: list[object] = [kind for kind in kinds if kind != ""]  # that would be a blank line
    for kind in kinds:
        for key in ("messages", "tools", "functions", "prompt", "completion"):
            rows += [{**CHAT, key: kind}, {"prompt": "a", "completion": "b", key: kind}]
        for key in message:
            rows.append({"messages": [{**message, key: kind}, {"role": kind, key: kind}, kind]})
        for key in ("id", "type", "function"):
            rows.append(answer(content="x", tool_calls=[{**CALL, key: kind}]))
        for key in ("name", "arguments"):
            rows.append(answer(content="x", function_call={"name": "f", "arguments": {}, key: kind}))
    report = report_of(*rows)
    assert report.rows == len(rows)
    assert Report.model_validate_json(report.model_dump_json()) == report


def test_a_wrong_role_is_told_the_nearest() -> None:
    report = report_of({"messages": [{"role": "asistant", "content": "x"}, *CHAT["messages"]]})
    assert "did you mean 'assistant'?" in report.errors[0].message


def test_several_errors_of_one_line_are_all_reported() -> None:
    report = report_of({"messages": [{"role": "user"}, {"content": "x"}]})
    assert [p.code for p in report.errors] == [
        "message_missing_key",
        "message_missing_key",
        "example_missing_assistant_message",
    ]


def test_a_file_keeps_one_format() -> None:
    assert only_error(CHAT, {"prompt": "a", "completion": "b"}) == (2, "$", "unexpected_file_format")


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (CHAT, "chat"),
        ({"prompt": "a", "completion": "b"}, "completion"),
        ({"prompt": CHAT["messages"][:1], "completion": CHAT["messages"][1:]}, "completion"),
        ({"input": CHAT, "preferred_output": [], "non_preferred_output": []}, "preference"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference"),
        ({"text": "a"}, "text"),
        ({"instruction": "a", "output": "b"}, "alpaca"),
        ({"instruction": "a", "chosen": "b", "rejected": "c"}, "alpaca-preference"),
        ({"conversations": []}, "sharegpt"),
        ({"conversations": [], "chosen": {}, "rejected": {}}, "sharegpt-preference"),
        ({"other": 1}, None),
    ],
)
def test_the_format_is_detected(row: dict[str, object], name: str | None) -> None:
    assert detect_format(row) == name
    assert report_of(row).format == name


def test_unknown_keys_of_a_row_are_warnings() -> None:
    report = report_of({**CHAT, "id": 7})
    assert report.error_count == 0
    assert [(p.path, p.code) for p in report.warnings] == [("$.id", "unrecognized_key")]


def test_the_report_is_json_and_comes_back() -> None:
    report = report_of(CHAT, {"messages": []})
    assert Report.model_validate_json(report.model_dump_json()) == report


def test_a_good_file_is_let_through() -> None:
    report = report_of(*[CHAT] * 10)
    assert check_for_training(report, role="training", minimum_rows=10) is None
    assert check_for_training(report, role="validation", minimum_rows=1, training_format="chat") is None


def test_too_few_examples_are_refused_in_openais_words() -> None:
    error = check_for_training(report_of(*[CHAT] * 7), role="training", minimum_rows=10)
    assert error is not None
    assert (error.code, error.param) == ("invalid_n_examples", "training_file")
    assert "Training file has 7 example(s), but must have at least 10 examples" in error.message


def test_the_first_error_and_the_number_of_the_others_fail_the_job() -> None:
    error = check_for_training(report_of(CHAT, *[{"messages": []}] * 3), role="training", minimum_rows=1)
    assert error is not None
    assert error.code == "invalid_training_file"
    assert "Line 2, $.messages" in error.message
    assert "and 2 more errors" in error.message


QUESTION, GOOD, BAD = CHAT["messages"][:1], CHAT["messages"][1:], [{"role": "assistant", "content": "go"}]
PREFERENCES = {
    "openai": {"input": {"messages": QUESTION}, "preferred_output": GOOD, "non_preferred_output": BAD},
    "older openai": {
        "input": {"messages": QUESTION, "tools": [], "parallel_tool_calls": True},
        "preferred_completion": GOOD,
        "non_preferred_completion": BAD,
    },
    "trl strings": {"prompt": "hi", "chosen": "hello", "rejected": "go"},
    "trl messages": {"prompt": QUESTION, "chosen": GOOD, "rejected": BAD},
}


@pytest.mark.parametrize("spelling", PREFERENCES)
def test_every_spelling_of_a_preference_trains_dpo_and_nothing_else(spelling: str) -> None:
    report = report_of(PREFERENCES[spelling])
    assert (report.format, report.error_count, report.warning_count) == ("preference", 0, 0)
    assert check_for_training(report, role="training", minimum_rows=1, type="dpo") is None
    error = check_for_training(report, role="training", minimum_rows=1)
    assert error is not None
    assert (error.code, error.param) == ("unexpected_file_format", "training_file")
    assert "preference data" in error.message
    assert 'method.type "dpo"' in error.message


@pytest.mark.parametrize("row", [CHAT, {"prompt": "a", "completion": "b"}])
def test_rows_without_a_preference_do_not_fit_dpo(row: dict[str, object]) -> None:
    error = check_for_training(report_of(row), role="validation", minimum_rows=1, type="dpo")
    assert error is not None
    assert (error.code, error.param) == ("unexpected_file_format", "validation_file")
    assert 'method.type "supervised"' in error.message
    assert "non_preferred_output" in error.message


OPENAI, STRINGS = PREFERENCES["openai"], PREFERENCES["trl strings"]
ASKED_BACK = [*GOOD, {"role": "user", "content": "and?"}]


@pytest.mark.parametrize(
    ("row", "path", "code"),
    [
        (OPENAI | {"non_preferred_output": GOOD}, "$", "equal_preference"),
        (STRINGS | {"rejected": "hello"}, "$", "equal_preference"),
        (OPENAI | {"input": {}}, "$.input.messages", "data_type"),
        (OPENAI | {"input": "hi"}, "$.input", "data_type"),
        (OPENAI | {"input": {"messages": []}}, "$.input.messages", "missing_messages_list"),
        (OPENAI | {"input": {"messages": QUESTION, "tools": 3}}, "$.input.tools", "data_type"),
        (OPENAI | {"preferred_output": "hello"}, "$.preferred_output", "data_type"),
        (OPENAI | {"preferred_output": []}, "$.preferred_output", "example_missing_assistant_message"),
        (OPENAI | {"preferred_output": ASKED_BACK}, "$.preferred_output[1].role", "unrecognized_role"),
        (STRINGS | {"chosen": GOOD}, "$.chosen", "data_type"),
        (STRINGS | {"prompt": 3}, "$.prompt", "data_type"),
        ({"prompt": "hi", "chosen": "hello"}, "$.rejected", "missing_key"),
        ({"chosen": "hello", "rejected": "go"}, "$.prompt", "missing_key"),
        ({"preferred_output": GOOD, "non_preferred_output": BAD}, "$.input", "missing_key"),
    ],
)
def test_what_is_wrong_with_a_preference_is_named(row: dict[str, object], path: str, code: str) -> None:
    assert only_error(row) == (1, path, code)


def test_an_empty_answer_of_a_preference_is_a_warning() -> None:
    report = report_of(STRINGS | {"rejected": " "})
    assert report.error_count == 0
    assert [(p.path, p.code) for p in report.warnings] == [("$.rejected", "empty_answer")]


def test_a_validation_file_has_the_training_files_format() -> None:
    error = check_for_training(
        report_of({"prompt": "a", "completion": "b"}),
        role="validation",
        minimum_rows=1,
        training_format="chat",
    )
    assert error is not None
    assert error.code == "invalid_validation_file"
    assert "chat" in error.message


def test_records_are_read_with_their_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes("\ufeff".encode() + b'{"text": "a"}\r\n\r\n{"text": "b"}')
    assert list(read_records(path)) == [(1, {"text": "a"}), (3, {"text": "b"})]


def test_reading_stops_at_a_line_that_is_no_object(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n3\n')
    with pytest.raises(DataError, match="Line 2 is not a dictionary"):
        list(read_records(path))


# --- formats that become one of the others -------------------------------------------------------------

ALPACA = {"instruction": "Add.", "input": "1 + 1", "output": "2"}
TURNS = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
SHAREGPT = {"conversations": TURNS}
CALLED = [
    {"from": "system", "value": "Add."},
    {"from": "human", "value": "1+1"},
    {"from": "function_call", "value": '{"name": "sum", "arguments": {"a": 1}}'},
    {"from": "observation", "value": "2"},
    {"from": "gpt", "value": "It is 2."},
]


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_an_instruction_and_its_input_become_one_question() -> None:
    assert canonical(ALPACA)["messages"] == [said("user", "Add.\n1 + 1"), said("assistant", "2")]
    bare = {"instruction": "Hi.", "input": "", "output": "Hello.", "system": "", "history": None}
    assert canonical(bare)["messages"] == [said("user", "Hi."), said("assistant", "Hello.")]


def test_an_instructions_history_and_system_prompt_come_before_it() -> None:
    row = {**ALPACA, "system": "Be.", "history": [["a", "b"]]}
    assert report_of(row).error_count == 0
    assert canonical(row)["messages"] == [
        said("system", "Be."),
        said("user", "a"),
        said("assistant", "b"),
        said("user", "Add.\n1 + 1"),
        said("assistant", "2"),
    ]


def test_a_sharegpt_conversation_becomes_messages_with_calls() -> None:
    row = {"conversations": CALLED, "tools": '[{"name": "sum", "parameters": {}}]'}
    assert report_of(row).error_count == 0
    chat = canonical(row)
    (call,) = chat["messages"][2]["tool_calls"]
    assert call["function"] == {"name": "sum", "arguments": {"a": 1}}
    assert chat["messages"][3] == {"role": "tool", "content": "2", "tool_call_id": call["id"]}
    assert [m["role"] for m in chat["messages"]] == ["system", "user", "assistant", "tool", "assistant"]
    assert chat["tools"] == [{"type": "function", "function": {"name": "sum", "parameters": {}}}]
    assert report_of(chat).error_count == 0


def test_instructions_and_turns_with_two_answers_are_preferences() -> None:
    alpaca = {"instruction": "Hi.", "chosen": "Hello.", "rejected": "Go."}
    sharegpt = {
        "conversations": TURNS[:1],
        "system": "Be.",
        "chosen": TURNS[1],
        "rejected": {"from": "gpt", "value": "Go."},
    }
    for row in (alpaca, sharegpt):
        report = report_of(row)
        assert (report.error_count, report.warning_count) == (0, 0), report
        assert check_for_training(report, role="training", minimum_rows=1, type="dpo") is None
        assert check_for_training(report, role="training", minimum_rows=1) is not None
        assert detect_format(canonical(row)) == "preference"
        assert report_of(canonical(row)).error_count == 0
    assert canonical(alpaca) == {
        "prompt": [said("user", "Hi.")],
        "chosen": [said("assistant", "Hello.")],
        "rejected": [said("assistant", "Go.")],
    }
    assert canonical(sharegpt)["prompt"] == [said("system", "Be."), said("user", "hi")]
    assert canonical(sharegpt)["rejected"] == [said("assistant", "Go.")]


def turns(*speakers: str) -> dict[str, object]:
    value = CALLED[2]["value"]
    return {"conversations": [{"from": s, "value": value if s == "function_call" else "x"} for s in speakers]}


@pytest.mark.parametrize(
    ("row", "path", "code"),
    [
        ({"instruction": "a"}, "$.output", "missing_key"),
        ({"instruction": 3, "output": "b"}, "$.instruction", "data_type"),
        ({"instruction": " ", "output": "b"}, "$.instruction", "missing_content"),
        (ALPACA | {"output": ["b"]}, "$.output", "data_type"),
        (ALPACA | {"input": 3}, "$.input", "data_type"),
        (ALPACA | {"history": "a"}, "$.history", "data_type"),
        (ALPACA | {"history": [["a", "b"], ["a"]]}, "$.history[1]", "data_type"),
        ({"instruction": "a", "chosen": "b"}, "$.rejected", "missing_key"),
        ({"instruction": "a", "chosen": "b", "rejected": "b"}, "$", "equal_preference"),
        ({"conversations": "x"}, "$.conversations", "missing_messages_list"),
        ({"conversations": []}, "$.conversations", "missing_messages_list"),
        (turns("system"), "$.conversations", "missing_messages_list"),
        ({"conversations": [3]}, "$.conversations[0]", "data_type"),
        ({"conversations": [said("user", "x")]}, "$.conversations[0].from", "unrecognized_role"),
        (turns("human", "assistant"), "$.conversations[1].from", "unrecognized_role"),
        ({"conversations": [TURNS[0], {"from": "gpt"}]}, "$.conversations[1].value", "missing_content"),
        (turns("gpt", "human"), "$.conversations", "example_missing_assistant_message"),
        (turns("human", "human", "gpt"), "$.conversations[1].from", "role_order"),
        (turns("human", "gpt", "system", "gpt"), "$.conversations[2].from", "role_order"),
        (turns("human", "gpt", "observation", "gpt"), "$.conversations[2].from", "tool_call_mismatch"),
        (turns("human", "gpt", "human"), "$.conversations", "example_missing_assistant_message"),
        (
            {"conversations": [TURNS[0], {"from": "function_call", "value": "sum(1)"}]},
            "$.conversations[1].value",
            "tool_call_mismatch",
        ),
        (
            {"conversations": [TURNS[0], {"from": "function_call", "value": '{"name":"f","arguments":3}'}]},
            "$.conversations[1].value",
            "tool_call_mismatch",
        ),
        (SHAREGPT | {"tools": "[sum"}, "$.tools", "data_type"),
        (SHAREGPT | {"tools": [{"sum": 1}]}, "$.tools[0]", "data_type"),
        (SHAREGPT | {"system": 3}, "$.system", "data_type"),
        (SHAREGPT | {"chosen": TURNS[1], "rejected": TURNS[0]}, "$.conversations", "role_order"),
        ({"conversations": TURNS[:1], "chosen": TURNS[1]}, "$.rejected", "missing_key"),
        (
            {"conversations": TURNS[:1], "chosen": TURNS[1], "rejected": TURNS[0]},
            "$.rejected.from",
            "role_order",
        ),
        (
            {"conversations": TURNS[:1], "chosen": TURNS[1], "rejected": TURNS[1]},
            "$",
            "equal_preference",
        ),
        ({"text": ""}, "$.text", "missing_content"),
        ({"text": ["a"]}, "$.text", "data_type"),
    ],
)
def test_what_is_wrong_with_a_converted_format_is_named_where_it_stands(
    row: dict[str, object], path: str, code: str
) -> None:
    report = report_of("", row)
    places = [(p.line, p.path, p.code) for p in report.errors]
    assert places[0] == (2, path, code)
    assert all(p.fix for p in report.errors)


def test_no_value_anywhere_makes_the_converted_formats_fail() -> None:
    kinds = [None, True, 0, 1.5, "", "x", "[", "[3]", '{"name": "f"}', [], [None], [{}], {}, [["a", 3]]]
    speakers = [*SPEAKERS, "user", None]
    rows: list[dict[str, object]] = []
    for kind in kinds:
        for row in (ALPACA, SHAREGPT, {"text": "a"}, ALPACA | {"chosen": "a", "rejected": "b"}):
            rows += [{**row, key: kind} for key in (*row, "system", "history", "tools", "chosen", "rejected")]
        rows += [{"conversations": [{"from": "human", "value": "x"}, kind]}]
        rows += [
            {"conversations": [{"from": "human", "value": "x"}, {"from": s, "value": kind}]} for s in speakers
        ]
    for row in rows:
        report = report_of(row)
        if not report.error_count:
            canonical(row)
    assert Report.model_validate_json(report.model_dump_json()) == report


SPEAKERS = ("system", "human", "observation", "gpt", "function_call")


@pytest.mark.parametrize("row", [ALPACA, SHAREGPT, {"text": "a"}])
def test_what_becomes_a_conversation_or_text_is_supervised(row: dict[str, object]) -> None:
    assert check_for_training(report_of(row), role="training", minimum_rows=1) is None
    error = check_for_training(report_of(row), role="training", minimum_rows=1, type="dpo")
    assert error is not None
    assert 'method.type "supervised"' in error.message


def test_a_validation_file_may_spell_a_conversation_in_another_way() -> None:
    def trouble(row: object, training_format: str) -> object:
        return check_for_training(
            report_of(row), role="validation", minimum_rows=1, training_format=training_format
        )

    assert trouble(ALPACA, "chat") is None
    assert trouble(SHAREGPT, "alpaca") is None
    assert trouble({"text": "a"}, "chat") is not None
    assert trouble({"prompt": "a", "completion": "b"}, "text") is not None


# --- the same twice, and almost nothing ----------------------------------------------------------------


def test_a_repeated_example_is_named_with_the_one_it_repeats() -> None:
    turned = {"messages": [dict(reversed(m.items())) for m in CHAT["messages"]]}
    report = report_of(CHAT, answer(content="other"), "", turned, CHAT)
    assert report.error_count == 0
    assert [(p.line, p.code) for p in report.warnings] == [(4, "duplicate"), (5, "duplicate")]
    assert "same as in line 1" in report.warnings[0].message


def test_many_examples_are_told_apart_in_little_memory() -> None:
    keys = [hash((i, i)) % 2**64 or 1 for i in range(100_000)]
    first: dict[int, int] = {}
    expected = [first.setdefault(key, i) for i, key in enumerate(keys)]
    tracemalloc.start()
    seen = Seen()
    found = [seen.earlier(key, i) for i, key in enumerate(keys)]
    del found
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held < 3.5 * 2**20  # a dict of as many numbers takes 11 MB
    again = [seen.earlier(key, 200_000) for key in keys]
    assert again == expected


def test_repeats_are_sought_among_so_many_and_no_more() -> None:
    seen = Seen(limit=2)
    assert [seen.earlier(key, line) for line, key in enumerate([5, 6, 7, 5, 7])] == [
        None,
        None,
        None,
        0,
        None,
    ]


@pytest.mark.parametrize("text", ["...", "-", "?!", "…"])
def test_an_answer_of_nothing_but_punctuation_is_warned_of(text: str) -> None:
    for row in (answer(content=text), ALPACA | {"output": text}, {"prompt": "a", "completion": text}):
        report = report_of(row)
        assert report.error_count == 0
        assert [p.code for p in report.warnings] == ["near_empty_answer"]


@pytest.mark.parametrize("text", ["A", "7", "+", "👍", "да"])
def test_a_short_answer_is_an_answer(text: str) -> None:
    assert report_of(answer(content=text)).warning_count == 0
