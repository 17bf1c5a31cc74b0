"""Kinds of files: detected by content, with the same report from each."""

import csv
import io
import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from olora_core.errors import DataError
from olora_core.formats import MAX_ROW_BYTES, Report, read_records, validate

CALL = {"id": "c1", "type": "function", "function": {"name": "sum", "arguments": '{"a": 1}'}}
CHAT = {
    "messages": [
        {"role": "user", "content": 'Say "1,\n2".'},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "2", "tool_call_id": "c1"},
        {"role": "assistant", "content": "Für 🙂 dich", "weight": 1},
    ],
    "tools": [{"type": "function", "function": {"name": "sum"}}],
}
PAIR = {
    "input": {"messages": CHAT["messages"][:1]},
    "preferred_output": [{"role": "assistant", "content": "a"}],
    "non_preferred_output": [{"role": "assistant", "content": "b"}],
}
ROWS = {
    "chat": [CHAT, CHAT | {"messages": [*CHAT["messages"][:1], {"role": "assistant", "content": "b"}]}],
    "completion": [{"prompt": "a;b", "completion": 'c "d"\n,e'}, {"prompt": "[1] is", "completion": "[2]"}],
    "preference": [PAIR, PAIR | {"preferred_output": [{"role": "assistant", "content": "c"}]}],
    "alpaca": [
        {"instruction": "a", "input": '{"b": 1}', "output": "c", "history": [["d", "e"]]},
        {"instruction": "a", "output": "c"},
    ],
    "sharegpt": [
        {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}], "system": "z"},
        {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "z"}]},
    ],
    "text": [{"text": "a\r\nb"}, {"text": "c"}],
}


def as_jsonl(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def as_json(rows: list[dict[str, Any]]) -> bytes:
    return json.dumps(rows, indent=2, ensure_ascii=False).encode()


def as_csv(rows: list[dict[str, Any]], delimiter: str = ",") -> bytes:
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names, delimiter=delimiter, restval="")
    writer.writeheader()
    writer.writerows(
        {name: cell if isinstance(cell, str) else json.dumps(cell) for name, cell in row.items()}
        for row in rows
    )
    return text.getvalue().encode()


def as_parquet(rows: list[dict[str, Any]], **options: Any) -> bytes:
    names = list(dict.fromkeys(name for row in rows for name in row))
    made = io.BytesIO()
    parquet.write_table(
        pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows]), made, **options
    )
    return made.getvalue()


WRITERS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "jsonl": as_jsonl,
    "json": as_json,
    "csv": as_csv,
    "parquet": as_parquet,
}


def records_in(data: bytes, folder: Path) -> list[dict[str, Any]]:
    (folder / "rows").write_bytes(data)
    return [record for _, record in read_records(folder / "rows")]


def only_error(data: bytes) -> tuple[int | None, str | None, str]:
    report = validate(io.BytesIO(data))
    assert report.error_count == 1, report.errors
    assert report.errors[0].fix
    return report.errors[0].line, report.errors[0].path, report.errors[0].code


@pytest.mark.parametrize("container", WRITERS)
@pytest.mark.parametrize("format", ROWS)
def test_every_format_comes_out_of_every_container_as_it_went_in(
    format: str, container: str, tmp_path: Path
) -> None:
    data = WRITERS[container](ROWS[format])
    report = validate(io.BytesIO(data))
    assert (report.format, report.container, report.rows) == (format, container, 2)
    assert (report.error_count, report.warning_count) == (0, 0), report
    assert without_nulls(records_in(data, tmp_path)) == without_nulls(ROWS[format])


@pytest.mark.parametrize("container", WRITERS)
def test_the_report_says_how_the_file_was_read(container: str) -> None:
    rows = [{"id": str(i), "prompt": f"a{i}", "completion": "b"} for i in range(2)]
    report = validate(io.BytesIO(WRITERS[container](rows)))
    columns = ", columns prompt, completion" if container in ("csv", "parquet") else ""
    names = {"jsonl": "JSONL", "json": "a JSON array", "csv": "CSV", "parquet": "Parquet"}
    assert report.detected == f"read as {names[container]}{columns}"
    assert Report.model_validate(report.model_dump(exclude={"detected"})).detected == ""


def without_nulls(value: Any) -> Any:
    """A Parquet column has every key in every row, so that null and absent are one."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    ("container", "line", "begins"),
    [("jsonl", 3, "Line 3"), ("json", 3, "Element 3"), ("csv", 5, "Line 5"), ("parquet", 3, "Row 3")],
)
def test_an_error_is_named_by_what_the_container_counts(container: str, line: int, begins: str) -> None:
    rows = [{"prompt": "a\nb", "completion": "c"}, {"prompt": "d", "completion": "e"}]
    data = WRITERS[container]([*rows, {"prompt": "f", "completion": ""}])
    assert only_error(data) == (line, "$.completion", "missing_content")
    report = validate(io.BytesIO(data))
    assert report.errors[0].message.startswith(f"{begins}, $.completion: ")
    assert Report.model_validate_json(report.model_dump_json()) == report


@pytest.mark.parametrize("container", ["json", "csv"])
@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_chunks_of_any_size_give_the_same_report(container: str, size: int) -> None:
    rows = [*ROWS["chat"], {"messages": []}, *ROWS["chat"]]
    data = b"\xef\xbb\xbf" + WRITERS[container](rows)
    whole = validate(io.BytesIO(data))
    assert (whole.rows, whole.error_count, whole.warning_count) == (5, 1, 2)
    assert [note.code for note in whole.notes] == ["byte_order_mark"]
    assert validate([data[i : i + size] for i in range(0, len(data), size)]) == whole


# --- one JSON array ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "line", "says"),
    [
        (b'[{"text": "a"}, {"text": "b"}', 2, "the file ends after it"),
        (b'[{"text": "a"}, {"text": "b', 2, "Unterminated string"),
        (b'[{"text": "a"} {"text": "b"}]', 1, "neither a comma nor the end"),
        (b'[{"text": "a"}, ]', 2, "not JSON"),
        (b'[{"text": "a"}]\n[{"text": "b"}]\n', 1, "More follows the end of the array"),
        (b'[{"text": "a"}, {"text": NaN}]', 2, "NaN"),
        (b'[{"text": "a"}, {"text": "\\ud800"}]', 2, "surrogate"),
        (b'[{"text": "a"}, ["b"]]', 2, "is a list, not an object"),
        (b'[{"text": "a"}, {"text": "\xff"}]', None, "Byte 27 of the file (0xff) is not UTF-8"),
        (b'[{"a": ' + b"[" * 100_000 + b"]", 1, "nested"),
    ],
)
def test_an_array_that_cannot_be_read_is_refused_with_the_element(data: bytes, line: int, says: str) -> None:
    report = validate(io.BytesIO(data))
    assert report.fatal is not None
    assert report.fatal.line == line
    assert says in report.fatal.sentence
    assert report.fatal.fix


def test_an_array_is_read_in_memory_that_does_not_grow_with_it() -> None:
    element = json.dumps({"text": "x" * 1000}).encode()

    def chunks() -> Iterator[bytes]:
        yield b"["
        for i in range(60):
            yield b",".join([element] * 256) + (b"," if i < 59 else b"]")

    tracemalloc.start()
    report = validate(chunks())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (report.rows, report.error_count) == (15_360, 0)  # 15 MB
    assert peak < 6 * 2**20


def test_an_element_without_an_end_is_named_and_takes_no_memory() -> None:
    def chunks() -> Iterator[bytes]:
        yield b'[{"text": "a"}, {"text": "'
        for _ in range(100):
            yield b"x" * 2**20

    tracemalloc.start()
    report = validate(chunks())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report.fatal is not None
    assert (report.fatal.line, "16 MB" in report.fatal.message) == (2, True)
    assert peak < 8 * MAX_ROW_BYTES


@pytest.mark.parametrize("container", ["jsonl", "json"])
@pytest.mark.parametrize("over", [0, 1])
@pytest.mark.parametrize("letter", ["x", "é"])
def test_a_record_may_have_16_mb_and_no_more(letter: str, over: int, container: str) -> None:
    size = MAX_ROW_BYTES - len('{"text": ""}')
    row = json.dumps({"text": letter * (size // len(letter.encode())) + "x" * over}, ensure_ascii=False)
    rows = [row, '{"text": "y"}']
    data = "\n".join(rows) if container == "jsonl" else "[" + ",".join(rows) + "]"
    report = validate(io.BytesIO(data.encode()))
    assert report.error_count == over
    if over:
        assert report.fatal is not None
        assert (report.fatal.line, "16 MB" in report.fatal.message) == (1, True)


# --- CSV -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_spreadsheets_separators_and_capitals_are_understood(delimiter: str, tmp_path: Path) -> None:
    data = as_csv(ROWS["completion"], delimiter).replace(b"prompt", b"Prompt", 1)
    report = validate(io.BytesIO(data))
    assert (report.format, report.container, report.error_count) == ("completion", "csv", 0)
    assert [note.code for note in report.notes] == ["delimiter"]
    assert records_in(data, tmp_path) == ROWS["completion"]


def test_columns_of_no_format_are_left_out_and_said_once() -> None:
    rows = [{"id": str(i), "text": f"t{i}"} for i in range(5)]
    for data in (as_csv(rows), as_parquet(rows)):
        report = validate(io.BytesIO(data))
        assert (report.rows, report.error_count) == (5, 0)
        assert [p.message for p in report.warnings] == [
            "Column 'id' is not part of the text format and is ignored."
        ]


def test_messages_in_a_cell_are_read_and_a_bracket_in_a_prompt_is_text(tmp_path: Path) -> None:
    messages = {"prompt": CHAT["messages"][:1], "completion": [{"role": "assistant", "content": "b"}]}
    assert records_in(as_csv([messages]), tmp_path) == [messages]
    assert records_in(as_csv(ROWS["completion"]), tmp_path) == ROWS["completion"]


@pytest.mark.parametrize(
    ("data", "place"),
    [
        (b"prompt,completion\na,b\nc\n", (3, "$", "data_type")),
        (b"messages,tools\n[{,\n", (2, "$.messages", "data_type")),
        (b'prompt,completion\na,b\n"c\nd,e\n', (3, None, "data_type")),
        (b"prompt,completion\na,\xff\n", (2, None, "data_type")),
        (b"prompt,prompt,completion\na,b,c\n", (1, None, "data_type")),
        (b"prompt,completion,chosen\na,b,c\n", (2, "$.rejected", "missing_key")),
    ],
)
def test_what_is_wrong_with_a_table_is_named(data: bytes, place: tuple[Any, ...]) -> None:
    assert only_error(data) == place


def test_a_quote_that_is_never_closed_takes_no_memory() -> None:
    def chunks() -> Iterator[bytes]:
        yield b'text,\n"a'
        for _ in range(100):
            yield b"x" * 2**19 + b"\n"

    tracemalloc.start()
    report = validate(chunks())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report.fatal is not None
    assert report.fatal.line == 2
    assert peak < 8 * MAX_ROW_BYTES


# --- Parquet -------------------------------------------------------------------------------------------


def test_a_parquet_files_row_groups_are_read_one_after_another(tmp_path: Path) -> None:
    rows = [{"text": f"row {i}"} for i in range(1000)]
    assert records_in(as_parquet(rows, row_group_size=70), tmp_path) == rows


def test_lists_in_text_cells_of_a_parquet_file_are_read(tmp_path: Path) -> None:
    rows = [{"messages": json.dumps(CHAT["messages"])}]
    assert records_in(as_parquet(rows), tmp_path) == [{"messages": CHAT["messages"]}]


@pytest.mark.parametrize("keep", [4, 20, -30, -4])
def test_a_parquet_file_that_is_not_whole_is_refused(keep: int) -> None:
    report = validate(io.BytesIO(as_parquet(ROWS["text"])[:keep]))
    assert report.fatal is not None
    assert "Parquet file cannot be read" in report.fatal.message


def test_every_damaged_byte_of_a_parquet_file_gives_a_report() -> None:
    data = as_parquet(ROWS["chat"], compression="NONE")
    for at in range(4, len(data), 7):
        damaged = bytearray(data)
        damaged[at] ^= 0x5A
        report = validate(io.BytesIO(bytes(damaged)))
        assert Report.model_validate_json(report.model_dump_json()).rows == report.rows


def test_columns_of_odd_types_are_no_crash() -> None:
    rows = [{"prompt": b"\x00\xff", "completion": float("nan")}, {"prompt": None, "completion": None}]
    report = validate(io.BytesIO(as_parquet(rows)))
    assert [p.line for p in report.errors] == [1, 2]


def test_pyarrow_is_loaded_for_parquet_files_alone() -> None:
    program = (
        'import io, sys; from olora_core.formats import validate; validate(io.BytesIO(b\'{"text": "a"}\'));'
        "sys.exit('pyarrow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_reading_records_stops_at_a_row_that_holds_none(tmp_path: Path) -> None:
    (tmp_path / "rows").write_bytes(b"prompt,completion\na,b\nc\nd,e\n")
    records = read_records(tmp_path / "rows")
    assert next(records) == (2, {"prompt": "a", "completion": "b"})
    with pytest.raises(DataError, match="Line 3: the row has 1 cells"):
        next(records)


def test_reading_records_stops_where_the_container_breaks(tmp_path: Path) -> None:
    (tmp_path / "rows").write_bytes(b'[{"text": "a"}, {"text": "b"}')
    records = read_records(tmp_path / "rows")
    assert [next(records), next(records)] == [(1, {"text": "a"}), (2, {"text": "b"})]
    with pytest.raises(DataError, match="Element 2 is followed by neither"):
        next(records)
