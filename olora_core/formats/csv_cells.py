"""The cells of CSV text (RFC 4180), for any separator.

The standard library's reader refuses cells beyond a length that can only be raised for the whole process.
"""

from collections.abc import Iterable, Iterator

from .rows import MAX_ROW_BYTES, Unreadable

REST = "What follows was not read."


def records(lines: Iterable[bytes], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of each record, with the line it begins on; a blank line has no cells.

    `lines` have their line ends. Raises Unreadable, after the records before, where the text is not CSV.
    """
    begins, size = 1, 0
    cells: list[str] = []
    held: list[str] | None = None
    for number, line in enumerate(lines, 1):
        if held is None:
            begins, size, cells = number, 0, []
        size += len(line)
        if size > MAX_ROW_BYTES:
            raise Unreadable(
                f"The row that begins on line {begins} is longer than {MAX_ROW_BYTES // 2**20} MB.",
                f"Split the example, or close its quote. {REST}",
                begins,
            )
        try:
            held = _take(_decoded(number, line), delimiter, cells, held)
        except _AfterQuote as error:
            raise _broken(begins, f"{error} follows a closing quote") from None
        if held is None:
            yield begins, cells
    if held is not None:
        raise _broken(begins, "a quote is not closed")


def _broken(line: int, what: str) -> Unreadable:
    return Unreadable(
        f"The row that begins on line {line} cannot be read: {what}.",
        f"Close every quote, and double those inside a cell. {REST}",
        line,
    )


class _AfterQuote(Exception):
    """Something other than a separator; the argument is its representation."""


def _take(line: str, delimiter: str, cells: list[str], held: list[str] | None) -> list[str] | None:
    """Adds the cells of a line to `cells`.

    `held` has the parts of a quoted cell that began on an earlier line. Returns the parts of a cell that does
    not end on this one.
    """
    body = line.rstrip("\r\n")
    if held is None and '"' not in body:
        cells += body.split(delimiter) if body else []
        return None
    at = 0
    while True:
        if held is None and body.startswith('"', at):
            held, at = [], at + 1
        if held is None:
            end = body.find(delimiter, at)
            end = len(body) if end < 0 else end
            cells.append(body[at:end])
            at = end
        else:
            end = _closing_quote(line, at)
            if end < 0:
                held.append(line[at:])
                return held
            cells.append("".join([*held, line[at:end]]).replace('""', '"'))
            held, at = None, end + 1
        if at >= len(body):
            return None
        if body[at] != delimiter:
            raise _AfterQuote(repr(body[at]))
        at += 1


def _closing_quote(line: str, at: int) -> int:
    """The place of the next quote that is not doubled; -1 if there is none."""
    end = line.find('"', at)
    while end >= 0 and line.startswith('"', end + 1):
        end = line.find('"', end + 2)
    return end


def _decoded(number: int, line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Unreadable(
            f"Line {number} is not UTF-8 (byte 0x{line[error.start]:02x} at position {error.start + 1} of "
            "the line).",
            "Save the file as UTF-8.",
            number,
        ) from None
