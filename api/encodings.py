"""Request bodies that were compressed on their way. They are unpacked piece by piece, within any limit."""

import zlib

from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope

from .errors import BadRequest

GZIP = 31
"""zlib's `wbits` for a gzip header and trailer."""
PIECE_BYTES = 2**18


def unpacked(scope: Scope, receive: Receive) -> Receive:
    """The same stream without its `content-encoding`, in pieces of bounded size.

    Raises BadRequest for an encoding other than gzip, here, and for a damaged body, where it is read.
    """
    encoding = Headers(scope=scope).get("content-encoding", "identity").strip().lower()
    if encoding in ("identity", ""):
        return receive
    if encoding not in ("gzip", "x-gzip"):
        raise BadRequest(
            f"content-encoding '{encoding[:40]}' is not supported; send the body as gzip or uncompressed."
        )
    stream = _Gzip(receive)
    return stream.receive


class _Gzip:
    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._member = zlib.decompressobj(GZIP)
        self._packed = b""
        self._more = True

    async def receive(self) -> Message:
        while True:
            if not self._packed and self._more:
                message = await self._receive()
                if message["type"] != "http.request":
                    return message
                self._packed, self._more = message.get("body", b""), message.get("more_body", False)
            body = self._unpack()
            more = bool(self._packed) or self._more
            if not more and not self._member.eof:
                raise BadRequest("The gzip body ends too early; send it again.")
            if body or not more:
                return {"type": "http.request", "body": body, "more_body": more}

    def _unpack(self) -> bytes:
        """The next piece; what is left to unpack stays in `_packed`."""
        if self._member.eof and self._packed:  # gzip files may be concatenated
            self._member = zlib.decompressobj(GZIP)
        try:
            body = self._member.decompress(self._packed, PIECE_BYTES)
        except zlib.error:
            raise BadRequest("The body is not gzip, as its content-encoding says; send it again.") from None
        self._packed = self._member.unused_data if self._member.eof else self._member.unconsumed_tail
        return body
