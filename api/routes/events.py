"""Events of jobs and comparisons: in pages, newest first, or as a stream that a client can resume."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query
from sqlalchemy import select
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response, StreamingResponse

from store import jobs
from store.errors import UnknownCursor
from store.events import events_since
from store.events import list_events as page_of_events
from store.kinds import COMPARISON, FINE_TUNING, Kind
from store.models import Event
from store.statuses import ENDED

from ..deps import After, Call, CallDep, Limit
from ..schemas.jobs import EventObject
from ..schemas.pages import Page

router = APIRouter(prefix="/v1")

POLL_SECONDS = 0.5
HEARTBEAT_SECONDS = 15.0
BATCH = 500


@dataclass(frozen=True)
class EventQuery:
    """Which events to send, and whether as a page or as a stream."""

    after: After = None
    limit: Limit = 20
    stream: Annotated[bool, Query(description="Server-sent events, oldest first, until the end.")] = False
    last_event_id: Annotated[str | None, Header(max_length=64)] = None


EventQueryDep = Annotated[EventQuery, Depends()]


@router.get("/fine_tuning/jobs/{job_id}/events", response_model=Page[EventObject], tags=["fine-tuning"])
async def list_events(job_id: str, call: CallDep, query: EventQueryDep) -> Page[EventObject] | Response:
    """A page, newest first. With `stream=true` server-sent events, oldest first: all of them, or those after
    `Last-Event-ID` (or `after`), until the job has ended; the last one is `event: done`.
    """
    return await _answer(call, FINE_TUNING, job_id, query)


@router.get("/comparisons/{comparison_id}/events", response_model=Page[EventObject], tags=["comparisons"])
async def list_comparison_events(
    comparison_id: str, call: CallDep, query: EventQueryDep
) -> Page[EventObject] | Response:
    """Like a job's events; one of type `run` reports each training run that has ended."""
    return await _answer(call, COMPARISON, comparison_id, query)


async def _answer(call: Call, kind: Kind, job_id: str, query: EventQuery) -> Page[EventObject] | Response:
    if not query.stream:
        return await run_in_threadpool(_page, call, kind, job_id, query.after, query.limit)
    param = "Last-Event-ID" if query.last_event_id else "after"
    seq = await run_in_threadpool(_start, call, kind, job_id, query.last_event_id or query.after, param)
    return StreamingResponse(
        _stream(call, kind, job_id, seq), media_type="text/event-stream", headers={"x-accel-buffering": "no"}
    )


def _page(call: Call, kind: Kind, job_id: str, after: str | None, limit: int) -> Page[EventObject]:
    with call.reading() as session:
        job = jobs.get_job(session, call.project_id, job_id, kind)
        page = page_of_events(session, job.id, after=after, limit=limit)
        return Page[EventObject].of([EventObject.of(row, kind) for row in page.data], page.has_more)


def _start(call: Call, kind: Kind, job_id: str, after: str | None, param: str) -> int:
    """The sequence number to continue after. Raises NotFound, and UnknownCursor for another job's event."""
    with call.reading() as session:
        job = jobs.get_job(session, call.project_id, job_id, kind)
        if after is None:
            return 0
        seq = session.scalar(select(Event.seq).where(Event.id == after, Event.job_id == job.id))
        if seq is None:
            raise UnknownCursor(after, param)
        return seq


async def _stream(call: Call, kind: Kind, job_id: str, seq: int) -> AsyncIterator[str]:
    """Holds neither a thread nor a connection while it waits between two reads of the database."""
    sent_at = time.monotonic()
    while not call.services.closing.is_set():
        rows, status = await run_in_threadpool(_new_events, call, kind, job_id, seq)
        for row in rows:
            yield _message(row.type, EventObject.of(row, kind).model_dump_json(), row.id)
            seq, sent_at = row.seq, time.monotonic()
        if len(rows) == BATCH:
            continue
        if status in ENDED:
            yield _message("done", f'{{"id":"{job_id}","status":"{status}"}}')
            return
        if time.monotonic() - sent_at >= HEARTBEAT_SECONDS:
            sent_at = time.monotonic()
            yield ": still here\n\n"
        await asyncio.sleep(POLL_SECONDS)


def _new_events(call: Call, kind: Kind, job_id: str, seq: int) -> tuple[list[Event], str]:
    """The status is read first: once it says that the job has ended, the last event has been written."""
    with call.reading() as session:
        status = jobs.get_job(session, call.project_id, job_id, kind).status
        return list(events_since(session, job_id, seq, BATCH)), status


def _message(kind: str, data: str, event_id: str | None = None) -> str:
    mark = f"id: {event_id}\n" if event_id else ""
    return f"{mark}event: {kind}\ndata: {data}\n\n"
