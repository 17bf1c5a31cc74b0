"""CSV: a header with the keys, then one row per example."""

import csv
from collections.abc import Iterable, Iterator
from itertools import chain

from .detection import KEYS, detect_format
from .report import Findings
from .rows import MAX_ROW_BYTES, Row, Unreadable
from .tables import columns_of, record_of

DELIMITERS = (",", ";", "\t")


def delimiter_of(head: bytes) -> str | None:
    """The column separator of a file with this beginning; None unless it has a header we know and a row."""
    first, _, rest = head.partition(b"\n")
    line = first.decode("utf-8", errors="replace")
    found = max(DELIMITERS, key=lambda delimiter: len(_known(line, delimiter)))
    names = _known(line, found) if rest.strip() else []
    return found if detect_format(dict.fromkeys(names)) or len(names) > 1 else None


def _known(line: str, delimiter: str) -> list[str]:
    return [name for name in _names(next(csv.reader([line], delimiter=delimiter), [])) if name in KEYS]


def _names(cells: list[str]) -> list[str]:
    """Column names, in lower case if known; spreadsheets capitalise them."""
    stripped = [cell.strip() for cell in cells]
    return [name.lower() if name.lower() in KEYS else name for name in stripped]


def rows(chunks: Iterator[bytes], findings: Findings, keep: str | None = None) -> Iterator[Row]:
    """Every row that is not blank, numbered by the line it begins on. Raises Unreadable."""
    head = next(chunks)
    delimiter = delimiter_of(head) or ","
    csv.field_size_limit(MAX_ROW_BYTES)
    reader = csv.reader(_lines(chain([head], chunks)), delimiter=delimiter, strict=True)
    if delimiter != ",":
        name = "tabs" if delimiter == "\t" else "semicolons"
        findings.note_once(1, "delimiter", f"The columns are separated by {name}.")
    begins = 1
    try:
        names = _names(next(reader))
        if repeated := [name for name in names if names.count(name) > 1]:
            raise Unreadable(f"Two columns are named '{repeated[0]}'.", "Name each column once.", line=1)
        columns = columns_of(names, findings, keep)
        begins = reader.line_num + 1
        for cells in reader:
            if len(cells) == len(columns):
                named = {name: cell for name, cell in zip(columns, cells, strict=True) if name}
                yield Row(begins, record_of(named, begins, findings))
            elif cells:
                findings.on(
                    begins,
                    "$",
                    "data_type",
                    f"the row has {len(cells)} cells, but the header names {len(columns)} columns.",
                    "Put cells that hold the separator, quotes or line ends in double quotes.",
                )
                yield Row(begins, None)
            else:
                findings.note_once(begins, "blank_line", f"Line {begins} is blank; blank lines are skipped.")
            begins = reader.line_num + 1
    except csv.Error as error:
        raise Unreadable(
            f"The row that begins on line {begins} cannot be read: {error}.",
            "Close every quote, and double those inside a cell. What follows was not read.",
            line=begins,
        ) from None


def _lines(chunks: Iterable[bytes]) -> Iterator[str]:
    """Lines with their ends, decoded."""
    number, buffer = 1, bytearray()
    for chunk in chunks:
        start = 0
        while (end := chunk.find(b"\n", start)) >= 0:
            buffer += chunk[start : end + 1]
            yield _decoded(number, buffer)
            number, start = number + 1, end + 1
            buffer.clear()
        buffer += chunk[start:]
        if len(buffer) > MAX_ROW_BYTES:
            raise Unreadable(
                f"Line {number} is longer than {MAX_ROW_BYTES // 2**20} MB.", "Split the example.", number
            )
    if buffer:
        yield _decoded(number, buffer)


def _decoded(number: int, line: bytearray) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Unreadable(
            f"Line {number} is not UTF-8 (byte 0x{line[error.start]:02x} at position {error.start + 1} of "
            "the line).",
            "Save the file as UTF-8.",
            number,
        ) from None
