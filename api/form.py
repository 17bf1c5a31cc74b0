"""A multipart form as a stream of pieces, so that a file can be stored while it arrives.

Nothing is spooled: the reader of the pieces decides what is kept, and may stop at any piece.
"""

from collections.abc import AsyncGenerator, AsyncIterable
from dataclasses import dataclass

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from .errors import BadRequest

MAX_PARTS = 20


@dataclass(frozen=True)
class PartBegins:
    """`filename` is None for a plain field."""

    name: str
    filename: str | None


@dataclass(frozen=True)
class PartData:
    data: bytes


@dataclass(frozen=True)
class PartEnds:
    pass


Piece = PartBegins | PartData | PartEnds


async def read_form(chunks: AsyncIterable[bytes], content_type: str) -> AsyncGenerator[Piece, None]:
    """Yields the pieces of a multipart/form-data body. Raises BadRequest if it is malformed."""
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise BadRequest(
            "Send the file as multipart/form-data with a boundary: a field 'purpose' and a file 'file'."
        )
    collector = _Collector()
    try:
        parser = MultipartParser(boundary, collector.callbacks())  # type: ignore[arg-type]
        async for chunk in chunks:
            parser.write(chunk)
            for piece in collector.take():
                yield piece
    except FormParserError as error:
        raise BadRequest(f"The multipart body cannot be read: {error}.") from None
    if not collector.complete:
        raise BadRequest(
            "The upload is incomplete: the multipart body ends before its closing boundary. Send it again."
        )


class _Collector:
    """Turns the parser's callbacks into pieces."""

    def __init__(self) -> None:
        self.complete = False
        self._pieces: list[Piece] = []
        self._parts = 0
        self._header_name = b""
        self._header_value = b""
        self._headers: dict[bytes, bytes] = {}

    def callbacks(self) -> dict[str, object]:
        return {
            "on_part_begin": self._on_part_begin,
            "on_header_field": self._on_header_field,
            "on_header_value": self._on_header_value,
            "on_header_end": self._on_header_end,
            "on_headers_finished": self._on_headers_finished,
            "on_part_data": self._on_part_data,
            "on_part_end": self._on_part_end,
            "on_end": self._on_end,
        }

    def take(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return pieces

    def _on_part_begin(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise BadRequest(f"The form has more than {MAX_PARTS} parts.")
        self._headers = {}

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _on_header_end(self) -> None:
        self._headers[self._header_name.lower()] = self._header_value
        self._header_name = self._header_value = b""

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        name = options.get(b"name")
        if name is None:
            raise BadRequest("A part of the form has no name; write it as 'form-data; name=\"…\"'.")
        filename = options.get(b"filename")
        self._pieces.append(PartBegins(_text(name), None if filename is None else _text(filename)))

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        self._pieces.append(PartData(data[start:end]))

    def _on_part_end(self) -> None:
        self._pieces.append(PartEnds())

    def _on_end(self) -> None:
        self.complete = True


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", errors="replace")
