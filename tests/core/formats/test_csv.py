"""CSV is recognised by its structure, and its cells are those that the standard library reads."""

import csv
import io
import json
import random
import threading
from pathlib import Path

import pytest

from olora_core.errors import DataError
from olora_core.formats import MAX_ROW_BYTES, container_of, read_records, validate
from olora_core.formats.csv_cells import records
from olora_core.formats.rows import Unreadable

CODE = "def wrap(self, text, width):\n    return [text[i:i + width] for i in range(0, len(text), width)]"


def chat(question: str, answer: str) -> str:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages}) + "\n"


def kind_of(data: bytes | str) -> tuple[str, str | None, int]:
    report = validate(io.BytesIO(data.encode() if isinstance(data, str) else data))
    return report.container, report.format, report.rows


@pytest.mark.parametrize(
    "text",
    [
        "a, text, b",
        "prompt, completion, text",
        "prompt;completion;input",
        "instruction\toutput\ttext",
        CODE,
        "messages",
    ],
)
def test_no_words_in_a_conversation_make_its_file_a_table(text: str) -> None:
    lines = chat(text, CODE) + chat("Again.", text) + chat("Once more.", text)
    assert kind_of(lines) == ("jsonl", "chat", 3)
    assert kind_of("\ufeff\n  \n" + lines) == ("jsonl", "chat", 3)
    array = [json.loads(line) for line in lines.splitlines()]
    for written in (json.dumps(array), json.dumps(array, indent=2), "\n\n" + json.dumps(array, indent=1)):
        assert kind_of(written) == ("json", "chat", 3)


@pytest.mark.parametrize(
    "first",
    [
        '{"messages": [{"role": "user", "content": "a, text, b"}',
        '"messages": [{"role": "user", "content": "a"}], "text": "prompt, completion, text"}',
        "prompt,completion",
        "id,text",
        "Export of messages, text, input",
        '{"prompt": "x", text, completion, "prompt"',
    ],
)
def test_a_first_line_of_broken_json_is_an_error_of_that_line(first: str) -> None:
    report = validate(io.BytesIO((first + "\n" + chat("a", "b") + chat("c", "d")).encode()))
    assert report.container == "jsonl"
    assert report.fatal is not None
    assert report.fatal.line == 1
    assert "Line 1 is not a dictionary" in report.fatal.message
    assert report.error_count == 1


@pytest.mark.parametrize("length", [60_000, 131_072, 140_000, 2_000_000])
def test_a_first_line_of_any_length_is_read(length: int) -> None:
    assert kind_of(chat("Sum up: " + "lorem, text, " * (length // 13), "x") + chat("a", "b")) == (
        "jsonl",
        "chat",
        2,
    )


@pytest.mark.parametrize("length", [131_072, 140_000, 2_000_000])
def test_a_cell_of_any_length_is_read(length: int, tmp_path: Path) -> None:
    for quote in ('"', ""):
        long = f"prompt,completion\n{quote}{'x' * length}{quote},b\n"
        assert kind_of(long) == ("csv", "completion", 1)
        assert kind_of(long.replace("prompt,", "id,").replace("completion", "text")) == ("csv", "text", 1)


def test_no_limit_of_the_process_is_changed() -> None:
    before = csv.field_size_limit()
    assert kind_of("prompt,completion\n" + "a" * 200_000 + ",b\n")[0] == "csv"
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("data", "format"),
    [
        ('"prompt","completion"\n"a","b"\n', "completion"),
        ('"Prompt";"Completion";"id"\n"a";"b";1\n', "completion"),
        ("prompt\tcompletion\r\na\tb, c; d\r\n", "completion"),
        ("\n\r\n \nprompt,completion\na,b\n", "completion"),
        ("\ufeff\nid,text\n1,a\n", "text"),
        ("text\nhello\nworld, wide\n", "text"),
        ("text,\nhello,\n", "text"),
        ("Unnamed: 0,text,note (old)\n0,a,b\n", "text"),
        ("id,text\n" + "1," + "a" * 70_000, "text"),
        ("prompt,completion\na\nb,c\n", "completion"),  # the first row is the error
        ('messages\n"[{""role"": ""user"", ""content"": ""x""}]"\n', "chat"),
        ('prompt,completion\n"{""a"": 1}",b\n', "completion"),
        ("question,answer\na,b\nc,d\n", None),
        ('"question";"answer"\na;"b;c"\n', None),
    ],
)
def test_a_header_and_rows_that_fit_it_are_a_table(data: str, format: str | None) -> None:
    assert kind_of(data)[:2] == ("csv", format)


@pytest.mark.parametrize(
    "data",
    [
        "Once upon a time, there was a text.\nIt had, like all texts, a second line.\n",
        "a, text, b\nno comma\n",
        "text\n",
        "text, width = 1, 2\nprint(text, width)\n",
        "import a, text, b\nprint(a)\n",
        "question,answer\na\n",
        "question\nwhy\n",
        '"a"\n"b"\n',
        "null\n3\n",
        "prompt,completion\n{}\n",
    ],
)
def test_a_text_that_happens_to_have_commas_is_none(data: str) -> None:
    report = validate(io.BytesIO(data.encode()))
    assert report.container == "jsonl"
    assert report.fatal is not None
    assert "not a dictionary" in report.fatal.message


def test_the_lines_of_a_table_are_counted_from_the_first_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b'\n\nprompt,completion\n\n"a\n\nb",c\n\nd\n')
    assert container_of(path) == "csv"
    records = read_records(path)
    assert next(records) == (5, {"prompt": "a\n\nb", "completion": "c"})
    with pytest.raises(DataError, match="Line 9: the row has 1 cells"):
        next(records)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_cells_are_those_of_the_standard_library(delimiter: str) -> None:
    """Over random text of the characters that matter, well formed or not."""
    draw = random.Random(7)
    broken = 0
    for _ in range(4000):
        text = "".join(draw.choices([delimiter, '"', "\n", "\r\n", "a", "é", " "], k=draw.randrange(14)))
        lines = io.StringIO(text, newline="\n").readlines()
        try:
            expected = list(csv.reader(lines, delimiter=delimiter, strict=True))
        except csv.Error:
            broken += 1
            with pytest.raises(Unreadable):
                list(records((line.encode() for line in lines), delimiter))
            continue
        found = list(records((line.encode() for line in lines), delimiter))
        assert [cells for _, cells in found] == expected, repr(text)
        assert [line for line, _ in found] == sorted({line for line, _ in found})
    assert 100 < broken < 3900


def test_a_cell_of_many_lines_is_read_line_by_line() -> None:
    lines = [b'"\n', *[b'x"",\n'] * 400_000, b'",b\n']
    (found,) = records(lines, ",")
    assert found == (1, ["\n" + 'x",\n' * 400_000, "b"])


def test_files_read_at_once_do_not_disturb_each_other() -> None:
    data = "prompt,completion\n" + "".join(f"{'a' * 150_000},b{i}\n" for i in range(20))
    found: list[tuple[str, str | None, int]] = []
    threads = [threading.Thread(target=lambda: found.append(kind_of(data))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [("csv", "completion", 20)] * 4


@pytest.mark.parametrize("over", [0, 1])
def test_a_row_of_several_cells_may_have_16_mb_and_no_more(over: int) -> None:
    half = MAX_ROW_BYTES // 2
    row = "a" * half + "," + "b" * (half - 2 + over) + "\n"
    report = validate(io.BytesIO(f"prompt,completion\n{row}c,d\n".encode()))
    assert report.rows == (0 if over else 2)
    if over:
        assert report.fatal is not None
        assert "line 2 is longer than 16 MB" in report.fatal.message
    else:
        assert report.error_count == 0
