"""CSV: a header with the keys, then one row per example."""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice

from .columns import ColumnMap
from .csv_cells import records
from .detection import KEYS
from .report import Findings
from .rows import HEAD_BYTES, MAX_ROW_BYTES, Row, Unreadable
from .tables import columns_of, record_of

DELIMITERS = (",", ";", "\t")
ROWS_TRIED = 20
"""Of as many rows, half must fit a header in which no name is known."""
LONGEST_NAME = 100
IN_NO_NAME = re.compile(r'[{}\[\]"<>=\r\n]')
"""Characters of JSON and of programs, which no name of a column has."""
JSON_OBJECT = re.compile(rb'\s*\{\s*("(?!")|\}|$)')
"""The beginning of a line with a JSON object; a CSV cell would have its quotes doubled."""


def delimiter_of(head: bytes) -> str | None:
    """The column separator of a file with this beginning; None unless it has a header, and rows that fit it.

    The header is recognised by its structure. A known name makes it more probable, but occurs in any text.
    """
    if head.lstrip()[:1] in (b"", b"{", b"["):
        return None
    lines = head[:HEAD_BYTES].split(b"\n")
    filled = [line for line in lines if line.strip()]
    if len(filled) < 2 or JSON_OBJECT.match(filled[1]):
        return None
    if len(head) >= HEAD_BYTES:
        lines.pop()  # it may go on
    begins = (_Beginning.of(lines, delimiter) for delimiter in DELIMITERS)
    tables = [begin for begin in begins if begin.is_table()]
    best = max(tables, key=lambda table: (len(table.known), len(table.names)), default=None)
    return best.delimiter if best else None


@dataclass(frozen=True)
class _Beginning:
    """The first rows of a file, by one separator."""

    delimiter: str
    names: list[str]
    rows: list[list[str]]

    @classmethod
    def of(cls, lines: Sequence[bytes], delimiter: str) -> "_Beginning":
        found: list[list[str]] = []
        read = records((line + b"\n" for line in lines), delimiter)
        with suppress(Unreadable):  # the rows before it count
            for cells in islice((cells for _, cells in read if any(map(str.strip, cells))), 1 + ROWS_TRIED):
                found.append(cells)
        return cls(delimiter, _names(found[0]) if found else [], found[1:])

    @property
    def known(self) -> list[str]:
        return [name for name in self.names if name in KEYS]

    def is_table(self) -> bool:
        if not any(self.names) or not all(map(_is_name, self.names)):
            return False
        fit = [len(cells) == len(self.names) for cells in self.rows]
        match len(self.known):
            case 0:
                return len(self.names) > 1 and any(fit[:1]) and 2 * sum(fit) >= len(fit)
            case 1:
                return all(fit[:1])
            case _:
                return True  # a row that does not fit is an error of the row


def _is_name(name: str) -> bool:
    return len(name) <= LONGEST_NAME and not IN_NO_NAME.search(name)


def _names(cells: Sequence[str]) -> list[str]:
    """Column names, in lower case if known; spreadsheets capitalise them."""
    stripped = [cell.strip() for cell in cells]
    return [name.lower() if name.lower() in KEYS else name for name in stripped]


def rows(chunks: Iterator[bytes], mapping: ColumnMap, findings: Findings) -> Iterator[Row]:
    """Every row that is not blank, numbered by the line it begins on. Raises Unreadable."""
    head = next(chunks)
    delimiter = delimiter_of(head) or ","
    if delimiter != ",":
        name = "tabs" if delimiter == "\t" else "semicolons"
        findings.note_once(1, "delimiter", f"The columns are separated by {name}.")
    columns: list[str | None] | None = None
    for line, cells in records(_lines(chain([head], chunks)), delimiter):
        if not cells or (columns is None and not any(map(str.strip, cells))):
            findings.note_once(line, "blank_line", f"Line {line} is blank; blank lines are skipped.")
        elif columns is None:
            columns = _columns(line, cells, mapping, findings)
        else:
            yield Row(line, _record(line, columns, cells, findings))


def _columns(line: int, cells: list[str], mapping: ColumnMap, findings: Findings) -> list[str | None]:
    """The key of each column. Raises Unreadable."""
    mapped = mapping.columns.values()
    own = [cell.strip() for cell in cells]
    names = [name if name in mapped else known for name, known in zip(own, _names(cells), strict=True)]
    if repeated := [name for name in names if name and names.count(name) > 1]:
        raise Unreadable(f"Two columns are named '{repeated[0]}'.", "Name each column once.", line)
    return columns_of(names, mapping, findings)


def _record(
    line: int, columns: list[str | None], cells: list[str], findings: Findings
) -> dict[str, object] | None:
    if len(cells) == len(columns):
        named = {name: cell for name, cell in zip(columns, cells, strict=True) if name}
        return record_of(named, line, findings)
    findings.on(
        line,
        "$",
        "data_type",
        f"the row has {len(cells)} cells, but the header names {len(columns)} columns.",
        "Put cells that hold the separator, quotes or line ends in double quotes.",
    )
    return None


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Lines with their ends; one that is longer than a row may be is not read to its end."""
    buffer = bytearray()
    for chunk in chunks:
        start = 0
        while (end := chunk.find(b"\n", start)) >= 0:
            buffer += chunk[start : end + 1]
            yield bytes(buffer)
            buffer.clear()
            start = end + 1
        buffer += chunk[start:]
        if len(buffer) > MAX_ROW_BYTES:
            yield bytes(buffer)
            buffer.clear()
    if buffer:
        yield bytes(buffer)
