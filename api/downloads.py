"""Sending stored files."""

import base64
import math
from collections.abc import Iterator
from pathlib import PurePosixPath
from urllib.parse import quote

from starlette.responses import StreamingResponse

from store.models import File
from store.storage import Storage

from .errors import NotFound

READ_BYTES = 3 * 2**18
"""A multiple of 3, so that pieces in base64 join without padding."""
MEDIA_TYPES = {
    ".csv": "text/csv; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".json": "application/json",
    ".jsonl": "application/jsonl",
    ".parquet": "application/vnd.apache.parquet",
    ".zip": "application/zip",
}


def send_file(storage: Storage, row: File, *, as_base64: bool = False) -> StreamingResponse:
    """Streams a stored file, under its own name and type."""
    if row.storage_key is None:
        raise NotFound(f"No such file: {row.id}.", param="file_id")
    storage.size(row.storage_key)  # raises before the answer begins when the bytes are gone
    suffix = PurePosixPath(row.filename).suffix.lower()
    headers = {
        "content-disposition": f"attachment; filename*=UTF-8''{quote(row.filename, safe='')}",
        "content-length": str(4 * math.ceil(row.bytes / 3) if as_base64 else row.bytes),
        "etag": f'"{row.sha256}"',
        "cache-control": "private, no-cache",
    }
    media_type = "text/plain" if as_base64 else MEDIA_TYPES.get(suffix, "application/octet-stream")
    pieces = _pieces(storage, row.storage_key, as_base64)
    return StreamingResponse(pieces, media_type=media_type, headers=headers)


def is_current(row: File, if_none_match: str | None) -> bool:
    """Whether the client already has these bytes."""
    tags = [tag.strip().removeprefix("W/") for tag in (if_none_match or "").split(",")]
    return f'"{row.sha256}"' in tags or tags == ["*"]


def _pieces(storage: Storage, key: str, as_base64: bool) -> Iterator[bytes]:
    with storage.open(key) as stream:
        while chunk := stream.read(READ_BYTES):
            yield base64.b64encode(chunk) if as_base64 else chunk
