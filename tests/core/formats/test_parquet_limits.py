"""Parquet files that unpack to far more than they hold are refused, or read, in bounded memory."""

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from olora_core.formats import MAX_ROW_BYTES, Report, validate
from olora_core.formats.parquet_layout import measure, read_layout

MIB = 2**20
MEASURE = """
import sys
from olora_core.formats import validate
import pyarrow.parquet

def high_water():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

before = high_water()
with open(sys.argv[1], "rb") as file:
    report = validate(file)
print(high_water() - before)
print(report.model_dump_json())
"""


def written(columns: dict[str, Any], **options: Any) -> bytes:
    made = io.BytesIO()
    parquet.write_table(pa.table(columns), made, **{"compression": "zstd"} | options)
    return made.getvalue()


def repeated(text: str, rows: int, **options: Any) -> bytes:
    """One cell, as often as there are rows; the file holds it once."""
    cells = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), [text])
    return written({"text": cells}, dictionary_pagesize_limit=2**30, **options)


def one_list(text: str, elements: int) -> bytes:
    """One conversation, all of whose messages have the same content."""
    content = pa.DictionaryArray.from_arrays(pa.array([0] * elements, pa.int32()), [text])
    role = pa.DictionaryArray.from_arrays(pa.array([0] * elements, pa.int32()), ["assistant"])
    messages = pa.StructArray.from_arrays([role, content], ["role", "content"])
    rows = pa.ListArray.from_arrays(pa.array([0, elements], pa.int32()), messages)
    return written({"messages": rows}, dictionary_pagesize_limit=2**30)


def numbers_in_lists(depth: int, elements: int) -> bytes:
    nested: pa.Array = pa.array([7] * elements, pa.int8())
    for _ in range(depth):
        nested = pa.ListArray.from_arrays(pa.array([0, len(nested)], pa.int32()), nested)
    return written({"messages": nested})


BOMBS: dict[str, Callable[[], bytes]] = {
    "a very long cell": lambda: repeated("x" * (300 * MIB), 1),
    "a very long cell, without a dictionary": lambda: written(
        {"text": ["x" * (300 * MIB)]}, use_dictionary=False
    ),
    "a long cell in every row": lambda: repeated("x" * (15 * MIB), 120),
    "a long cell in every row, by prefixes": lambda: written(
        {"text": ["x" * (4 * MIB)] * 120}, use_dictionary=False, column_encoding={"text": "DELTA_BYTE_ARRAY"}
    ),
    "a long cell in every message": lambda: one_list("x" * MIB, 1600),
    "very many messages": lambda: one_list("x", 16_000_000),
    "very many messages of many pages": lambda: one_list("x", 20_000_000),
    "numbers in lists in lists": lambda: numbers_in_lists(5, 40_000_000),
    "very many rows": lambda: repeated("x", 40_000_000),
}


@pytest.mark.slow
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_small_file_takes_little_memory_whatever_it_unpacks_to(bomb: str, tmp_path: Path) -> None:
    path = tmp_path / "bomb.parquet"
    path.write_bytes(BOMBS[bomb]())
    assert path.stat().st_size < MIB
    answer = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    report = Report.model_validate_json(answer[1])
    assert int(answer[0]) < 512 * 1024, answer  # KiB
    assert report.fatal is not None or report.rows == 120
    if report.fatal is not None:
        assert report.fatal.fix


@pytest.mark.parametrize("over", [0, 1])
def test_a_row_may_have_16_mb_and_no_more(over: int) -> None:
    """A value adds 8 bytes to its text."""
    report = validate(io.BytesIO(repeated("x" * (MAX_ROW_BYTES - 8 + over), 3)))
    assert report.rows == 3
    if over:
        assert [problem.line for problem in report.errors] == [1, 2, 3]
        assert "Row 1 is longer than 16 MB" in report.errors[0].message
    else:
        assert report.error_count == 0


def test_one_long_row_is_named_and_the_others_are_read() -> None:
    report = validate(io.BytesIO(written({"text": ["a", "b" * (17 * MIB), "c"]})))
    assert (report.rows, [problem.line for problem in report.errors]) == (3, [2])


def test_a_long_conversation_of_one_repeated_message_is_measured_before_it_is_made() -> None:
    report = validate(io.BytesIO(one_list("x" * MIB, 20)))
    assert [problem.message for problem in report.errors] == ["Row 1 is longer than 16 MB."]


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd", "gzip"])
def test_the_layout_is_that_of_pyarrow(version: str, compression: str) -> None:
    """Paths, offsets and sizes of the metadata, and pages that add up to them."""
    rows = [
        {"id": i, "messages": [{"role": "user", "content": f"{i}" * (i % 50)}] * (i % 4), "f": b"abc"}
        for i in range(5000)
    ]
    kinds = pa.schema(
        [
            ("id", pa.int64()),
            ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
            ("f", pa.binary(3)),
        ]
    )
    file = io.BytesIO()
    parquet.write_table(
        *(pa.Table.from_pylist(rows, kinds), file),
        compression=compression,
        data_page_version=version,
        row_group_size=1700,
        data_page_size=1000,
    )
    layout, expected = read_layout(file), parquet.ParquetFile(file)
    assert (layout.rows, layout.bytes) == (5000, len(file.getvalue()))
    columns = [expected.schema.column(i) for i in range(4)]
    assert [(leaf.path, leaf.is_repeated, leaf.width) for leaf in layout.leaves] == [
        (column.path, column.max_repetition_level > 0, column.length) for column in columns
    ]
    assert len(layout.groups) == 3
    for group, chunks in enumerate(layout.groups):
        for leaf, chunk in enumerate(chunks):
            about = expected.metadata.row_group(group).column(leaf)
            measured = measure(file, chunk)
            assert (measured.values, chunk.packed_bytes) == (about.num_values, about.total_compressed_size)
            headers = about.total_uncompressed_size - measured.bytes
            assert 0 < headers < 100 * about.num_values
            assert measured.page_values < 5000


def test_every_damaged_byte_of_the_metadata_gives_a_report() -> None:
    data = written({"messages": [[{"role": "user", "content": "x"}]] * 3, "id": [1, 2, 3]})
    for at in range(len(data) - 900, len(data)):
        for flip in (0x01, 0x80, 0xFF):
            damaged = bytearray(data)
            damaged[at] ^= flip
            assert validate(io.BytesIO(bytes(damaged))).container == "parquet"
