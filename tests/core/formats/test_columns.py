"""Columns of other names: what they are told in every container, and the mapping that reads them."""

import io
from pathlib import Path
from typing import Any

import pytest

from olora_core.errors import DataError, SpecError
from olora_core.formats import Report, canonical, check_for_training, read_records, validate

from .test_containers import WRITERS

ROWS = [{"question": f"q{i}", "answer": f"a{i}", "id": str(i)} for i in range(3)]
COLUMNS = {"prompt": "question", "completion": "answer"}
PAIRS = [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(3)]
EVERY = pytest.mark.parametrize("container", WRITERS)


def report_of(container: str, rows: list[dict[str, Any]], columns: dict[str, str] | None = None) -> Report:
    return validate(io.BytesIO(WRITERS[container](rows)), columns)


def read(container: str, rows: list[dict[str, Any]], columns: dict[str, str], folder: Path) -> list[Any]:
    (folder / "rows").write_bytes(WRITERS[container](rows))
    found = [record for _, record in read_records(folder / "rows", columns)]
    return [{key: value for key, value in record.items() if key != "id"} for record in found]


@EVERY
def test_unknown_columns_are_told_the_same_in_every_container(container: str) -> None:
    report = report_of(container, ROWS)
    assert (report.container, report.fatal, report.rows, report.error_count) == (container, None, 3, 3)
    _, says = report.errors[0].message.split(": ", 1)
    assert says == (
        "no known format: found columns question, answer, id; expected messages, or prompt + completion, or "
        "instruction + output."
    )
    assert "--columns prompt=question,completion=answer" in report.errors[0].fix
    assert "olora.columns" in report.errors[0].fix


@EVERY
@pytest.mark.parametrize(
    ("row", "missing"),
    [
        ({"prompt": "a", "answer": "b"}, "completion"),
        ({"instruction": "a", "response": "b"}, "output"),
        ({"question": "a", "chosen": "b", "rejected": "c"}, "prompt"),
    ],
)
def test_a_missing_key_may_have_another_name(row: dict[str, Any], missing: str, container: str) -> None:
    report = report_of(container, [row])
    assert [problem.path for problem in report.errors] == [f"$.{missing}"]
    assert "map your columns" in report.errors[0].fix
    other = next(name for name in ("answer", "response", "question") if name in row)
    assert report_of(container, [row], {missing: other}).error_count == 0


@EVERY
def test_mapped_columns_are_read_under_their_keys(container: str, tmp_path: Path) -> None:
    report = report_of(container, ROWS, COLUMNS)
    assert (report.format, report.container, report.error_count) == ("completion", container, 0)
    assert report.detected.endswith(", columns question as prompt, answer as completion")
    assert {problem.message.split("'")[1] for problem in report.warnings} == {"id"}
    assert check_for_training(report, role="training", minimum_rows=3) is None
    assert read(container, ROWS, COLUMNS, tmp_path) == PAIRS


@EVERY
def test_columns_may_change_places(container: str, tmp_path: Path) -> None:
    turned = [{"prompt": row["completion"], "completion": row["prompt"]} for row in PAIRS]
    assert read(container, turned, {"prompt": "completion", "completion": "prompt"}, tmp_path) == PAIRS


@EVERY
def test_a_column_with_the_name_of_a_mapped_key_is_left_out(container: str, tmp_path: Path) -> None:
    rows = [{**row, "prompt": "another", "messages": "none", "text": "x"} for row in ROWS]
    assert report_of(container, rows, COLUMNS).error_count == 0
    assert read(container, rows, COLUMNS, tmp_path) == PAIRS


@EVERY
def test_one_key_may_be_mapped_and_the_others_have_their_names(container: str, tmp_path: Path) -> None:
    rows = [{"prompt": row["prompt"], "answer": row["completion"], "rate": 0.5} for row in PAIRS]
    columns = {"completion": "answer", "weight": "rate"}
    assert report_of(container, rows, columns).error_count == 0
    assert read(container, rows, columns, tmp_path) == [{**row, "weight": 0.5} for row in PAIRS]


@EVERY
def test_nested_columns_may_have_other_names(container: str, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    report = report_of(container, [{"dialog": turns, "reward": 1}], {"messages": "dialog"})
    assert (report.format, report.error_count) == ("chat", 0), report.errors
    spoken = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    (record,) = read(container, [{"messages": spoken}], {"conversations": "messages"}, tmp_path)
    assert canonical(record)["messages"] == turns


@EVERY
def test_a_column_that_no_row_has_is_named(container: str) -> None:
    report = report_of(container, ROWS, COLUMNS | {"tools": "functions list"})
    assert report.fatal is not None
    assert report.fatal.message == (
        "The file has no column 'functions list', which is mapped to 'tools'; found columns question, "
        "answer, id."
    )
    assert report.fatal.fix
    error = check_for_training(report, role="training", minimum_rows=1)
    assert error is not None
    assert "functions list" in error.message


@pytest.mark.parametrize("container", ["jsonl", "json"])
def test_a_mapped_key_may_be_missing_in_some_objects(container: str) -> None:
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "a", "output": "c", "context": "d"}]
    assert report_of(container, rows, {"input": "context"}).error_count == 0


def test_an_empty_file_is_called_empty_with_a_mapping_too() -> None:
    assert [problem.code for problem in validate(io.BytesIO(b""), COLUMNS).errors] == ["empty_file"]


def test_a_header_is_mapped_as_it_is_written(tmp_path: Path) -> None:
    data = b"Prompt,Text,Completion\nshort,q0,a0\n"
    (tmp_path / "rows").write_bytes(data)
    mapping = {"prompt": "Text"}
    assert [record for _, record in read_records(tmp_path / "rows", mapping)] == [
        {"prompt": "q0", "completion": "a0"}
    ]


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"promt": "question"}, "'promt' is no key of a training file (did you mean 'prompt'?)"),
        ({"question": "prompt"}, "'question' is no key"),
        ({"prompt": "a", "completion": "a"}, "column 'a' is given for 'prompt' and for 'completion'"),
        ({"prompt": ""}, "the column for 'prompt' is empty"),
    ],
)
def test_a_mapping_that_cannot_be_meant_is_refused(
    columns: dict[str, str], says: str, tmp_path: Path
) -> None:
    (tmp_path / "rows").write_bytes(WRITERS["jsonl"](ROWS))
    with pytest.raises(SpecError) as refused:
        report_of("jsonl", ROWS, columns)
    assert says in refused.value.message
    assert refused.value.param == "columns"
    with pytest.raises(SpecError):
        list(read_records(tmp_path / "rows", columns))


def test_reading_with_a_mapping_names_the_first_row_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "rows").write_bytes(b"question,answer\na,b\nc\n")
    records = read_records(tmp_path / "rows", COLUMNS)
    assert next(records) == (2, {"prompt": "a", "completion": "b"})
    with pytest.raises(DataError, match="Line 3"):
        next(records)
