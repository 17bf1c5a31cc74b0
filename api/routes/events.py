"""A job's events: in pages, newest first, or as a stream that a client may leave and come back to."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Header, Query
from sqlalchemy import select
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response, StreamingResponse

from store import jobs
from store.errors import UnknownCursor
from store.events import events_since
from store.events import list_events as page_of_events
from store.models import Event

from ..deps import After, Call, CallDep, Limit
from ..schemas.jobs import EventObject
from ..schemas.pages import Page

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["fine-tuning"])

POLL_SECONDS = 0.5
HEARTBEAT_SECONDS = 15.0
BATCH = 500


@router.get("/{job_id}/events", response_model=Page[EventObject])
async def list_events(
    job_id: str,
    call: CallDep,
    after: After = None,
    limit: Limit = 20,
    stream: Annotated[bool, Query(description="Server-sent events, oldest first, until the end.")] = False,
    last_event_id: Annotated[str | None, Header(max_length=64)] = None,
) -> Page[EventObject] | Response:
    """A page, newest first. With `stream=true` server-sent events, oldest first: all of them, or those after
    `Last-Event-ID` (or `after`), until the job has ended; the last one is `event: done`.
    """
    if not stream:
        return await run_in_threadpool(_page, call, job_id, after, limit)
    param = "Last-Event-ID" if last_event_id else "after"
    seq = await run_in_threadpool(_start, call, job_id, last_event_id or after, param)
    return StreamingResponse(
        _stream(call, job_id, seq), media_type="text/event-stream", headers={"x-accel-buffering": "no"}
    )


def _page(call: Call, job_id: str, after: str | None, limit: int) -> Page[EventObject]:
    with call.reading() as session:
        job = jobs.get_job(session, call.project_id, job_id)
        page = page_of_events(session, job.id, after=after, limit=limit)
        return Page[EventObject].of([EventObject.of(row) for row in page.data], page.has_more)


def _start(call: Call, job_id: str, after: str | None, param: str) -> int:
    """The sequence number to go on from. Raises NotFound, and UnknownCursor for another job's event."""
    with call.reading() as session:
        job = jobs.get_job(session, call.project_id, job_id)
        if after is None:
            return 0
        seq = session.scalar(select(Event.seq).where(Event.id == after, Event.job_id == job.id))
        if seq is None:
            raise UnknownCursor(after, param)
        return seq


async def _stream(call: Call, job_id: str, seq: int) -> AsyncIterator[str]:
    """Holds neither a thread nor a connection between its looks at the database."""
    spoken = time.monotonic()
    while not call.services.closing.is_set():
        rows, status = await run_in_threadpool(_news, call, job_id, seq)
        for row in rows:
            yield _message(row.type, EventObject.of(row).model_dump_json(), row.id)
            seq, spoken = row.seq, time.monotonic()
        if len(rows) == BATCH:
            continue
        if status in jobs.ENDED:
            yield _message("done", f'{{"id":"{job_id}","status":"{status}"}}')
            return
        if time.monotonic() - spoken >= HEARTBEAT_SECONDS:
            spoken = time.monotonic()
            yield ": still here\n\n"
        await asyncio.sleep(POLL_SECONDS)


def _news(call: Call, job_id: str, seq: int) -> tuple[list[Event], str]:
    """The status is read first: once it says that the job has ended, its last event is there to be read."""
    with call.reading() as session:
        status = jobs.get_job(session, call.project_id, job_id).status
        return list(events_since(session, job_id, seq, BATCH)), status


def _message(kind: str, data: str, event_id: str | None = None) -> str:
    mark = f"id: {event_id}\n" if event_id else ""
    return f"{mark}event: {kind}\ndata: {data}\n\n"
