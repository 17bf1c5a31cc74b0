"""Files: an upload is stored while it arrives and becomes a file once it has been validated."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse

from olora_core.formats import Report, validate
from olora_core.specs import nearest
from store import files
from store.errors import TooLarge as StoredTooLarge
from store.idempotency import content_digest
from store.storage import Writer

from ..adapter_zips import base_of_adapter
from ..deps import After, Call, CallDep
from ..downloads import send_file
from ..errors import BadRequest
from ..form import PartBegins, PartData, PartEnds, read_form
from ..idempotency import once
from ..schemas.files import ADAPTER_PURPOSE, UPLOAD_PURPOSES, FileObject
from ..schemas.pages import Deleted, Page
from ..security import large_file

router = APIRouter(prefix="/v1/files", tags=["files"])

WRITE_BYTES = 2**20
FIELD_BYTES = 1000
FIELDS = ("purpose", "expires_after[anchor]", "expires_after[seconds]")


@dataclass
class Form:
    """The fields of an upload."""

    values: dict[str, str] = field(default_factory=dict)
    filename: str | None = None

    @property
    def expires_in(self) -> int | None:
        seconds = self.values.get("expires_after[seconds]")
        return None if seconds is None else int(seconds)


BODY_SCHEMA = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["purpose", "file"],
                    "properties": {
                        "purpose": {"type": "string", "enum": list(UPLOAD_PURPOSES)},
                        "file": {"type": "string", "format": "binary"},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2_592_000},
                    },
                }
            }
        },
    }
}


@router.post("", openapi_extra=BODY_SCHEMA)
async def create_file(request: Request, call: CallDep) -> FileObject:
    """Multipart: `purpose`, `file`, and optionally `expires_after[anchor]` and `expires_after[seconds]`."""
    file_id = files.new_file_id()
    try:
        async with _writer(call, files.file_key(file_id)) as writer:
            form = await _receive(request, writer)
            report = await run_in_threadpool(_validate, form, writer)
    except StoredTooLarge:
        raise large_file(call.settings.max_upload_bytes) from None
    return await run_in_threadpool(_record, call, file_id, form, writer, report)


@contextlib.asynccontextmanager
async def _writer(call: Call, key: str) -> AsyncIterator[Writer]:
    """A writer that publishes at the end of the block, in a thread; on any error nothing is kept."""
    writer = await run_in_threadpool(call.storage.writer, key, max_bytes=call.settings.max_upload_bytes)
    try:
        yield writer
    except BaseException:
        writer.discard()
        raise
    await run_in_threadpool(writer.publish)


async def _receive(request: Request, writer: Writer) -> Form:
    """Reads the form and writes the file's bytes; an invalid field ends the reading at once."""
    form, name, text, pending = Form(), "", bytearray(), bytearray()
    pieces = read_form(request.stream(), request.headers.get("content-type", ""))
    async with contextlib.aclosing(pieces):
        async for piece in pieces:
            if isinstance(piece, PartBegins):
                name = _known_part(piece, form)
                text.clear()
            elif isinstance(piece, PartData) and name == "file":
                pending += piece.data
                if len(pending) >= WRITE_BYTES:
                    await _write(writer, pending)
            elif isinstance(piece, PartData):
                text += piece.data
                if len(text) > FIELD_BYTES:
                    raise BadRequest(f"{name} is longer than {FIELD_BYTES} bytes.", param=name)
            elif isinstance(piece, PartEnds) and name != "file":
                form.values[name] = text.decode("utf-8", errors="replace")
                _check_field(name, form.values[name])
    if pending:
        await _write(writer, pending)
    _check_form(form, writer)
    return form


async def _write(writer: Writer, pending: bytearray) -> None:
    """Hands the bytes to the writer, in a thread, and empties the buffer."""
    await run_in_threadpool(writer.write, bytes(pending))
    pending.clear()


def _known_part(part: PartBegins, form: Form) -> str:
    """The part's name; keeps the file's own. Raises BadRequest for an unknown or repeated part."""
    if part.name == "file":
        if form.filename is not None:
            raise BadRequest("The form contains two files; send one file per request.", param="file")
        form.filename = _safe_name(part.filename)
    elif part.name not in FIELDS:
        hint = nearest(part.name, (*FIELDS, "file"))
        raise BadRequest(f"The form's field {part.name[:80]!r} is unknown{hint}.", param=part.name[:80])
    elif part.name in form.values:
        raise BadRequest(f"{part.name} is given twice.", param=part.name)
    return part.name


def _safe_name(name: str | None) -> str:
    """The client's file name without folders and control characters; it is shown, never used as a path."""
    last = (name or "").replace("\\", "/").rsplit("/", 1)[-1]
    return "".join(sign for sign in last if sign.isprintable())[:255].strip() or "upload"


def _check_field(name: str, value: str) -> None:
    if name == "purpose" and value not in UPLOAD_PURPOSES:
        hint = nearest(value[:40], UPLOAD_PURPOSES)
        allowed = ", ".join(UPLOAD_PURPOSES)
        raise BadRequest(
            f"purpose {value[:40]!r} is unknown{hint}. It must be one of: {allowed}.", param=name
        )
    if name == "expires_after[anchor]" and value != "created_at":
        raise BadRequest(f"expires_after[anchor] must be 'created_at', not {value[:40]!r}.", param=name)
    if name == "expires_after[seconds]" and not _is_lifetime(value):
        raise BadRequest(
            f"expires_after[seconds] must be a whole number from 3600 to 2592000, not {value[:40]!r}.",
            param=name,
        )


def _is_lifetime(value: str) -> bool:
    return value.isdecimal() and len(value) <= 7 and 3600 <= int(value) <= 2_592_000


def _check_form(form: Form, writer: Writer) -> None:
    for name in ("purpose", "file"):
        if name not in form.values and not (name == "file" and form.filename is not None):
            raise BadRequest(f"{name} is missing from the form; it is required.", param=name)
    given = [name for name in FIELDS[1:] if name in form.values]
    if len(given) == 1:
        raise BadRequest(
            "expires_after needs both expires_after[anchor] and expires_after[seconds].", param=given[0]
        )
    if writer.bytes == 0:
        raise BadRequest(
            "The file is empty. Write one JSON object per line.", param="file", code="empty_file"
        )


def _validate(form: Form, writer: Writer) -> Report | None:
    """The report on a training file. Raises BadRequest if it cannot be read as rows, or is no adapter."""
    if form.values["purpose"] == ADAPTER_PURPOSE:
        with writer.reread() as stream:
            base_of_adapter(stream)
    if form.values["purpose"] != "fine-tune":
        return None
    with writer.reread() as stream:
        report = validate(stream)
    if report.fatal is not None:
        more = report.error_count - 1
        rest = f" (and {more} more error{'s' if more > 1 else ''})" if more > 0 else ""
        raise BadRequest(
            f"{report.fatal.sentence}{rest}",
            param="file",
            code=report.fatal.code,
            details=[problem.model_dump() for problem in report.errors],
        )
    return report


def _record(call: Call, file_id: str, form: Form, writer: Writer, report: Report | None) -> FileObject:
    """Creates the file's row. A retry gets the first try's row, and its own bytes are deleted."""

    def make(session: Session) -> str:
        files.record_file(
            session,
            file_id=file_id,
            project_id=call.project_id,
            filename=form.filename or "upload",
            purpose=form.values["purpose"],
            bytes=writer.bytes,
            sha256=writer.sha256,
            report=None if report is None else report.model_dump(mode="json"),
            expires_in=form.expires_in,
        )
        return file_id

    # Each try of a multipart request has another boundary, so the digest is over the fields and the file.
    content = content_digest(
        str(form.filename), *(form.values.get(name, "") for name in FIELDS), writer.sha256
    )
    kept = False
    try:
        made_id, kept = once(call, "POST /v1/files", content, make)
    finally:
        if not kept:
            call.storage.delete(files.file_key(file_id))
    with call.reading() as session:
        return FileObject.of(files.get_file(session, call.project_id, made_id))


@router.get("")
def list_files(
    call: CallDep,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: Annotated[str | None, Query(max_length=32)] = None,
) -> Page[FileObject]:
    with call.reading() as session:
        page = files.list_files(
            session, call.project_id, after=after, limit=limit, order=order, purpose=purpose
        )
        found = [FileObject.of(row, listed=True) for row in page.data]
        return Page[FileObject].of(found, page.has_more)


@router.get("/{file_id}")
def retrieve_file(file_id: str, call: CallDep) -> FileObject:
    with call.reading() as session:
        return FileObject.of(files.get_file(session, call.project_id, file_id))


@router.delete("/{file_id}")
def delete_file(file_id: str, call: CallDep) -> Deleted:
    with call.writing() as session:
        files.delete_file(session, call.project_id, file_id)
    call.nudge()
    return Deleted(id=file_id, object="file")


@router.get("/{file_id}/content", response_class=StreamingResponse)
def retrieve_content(
    file_id: str, call: CallDep, encoding: Literal["base64"] | None = None
) -> StreamingResponse:
    """The file's bytes; with `encoding=base64` for notebooks that decode result files."""
    with call.reading() as session:
        row = files.get_file(session, call.project_id, file_id)
    return send_file(call.storage, row, as_base64=encoding == "base64")
