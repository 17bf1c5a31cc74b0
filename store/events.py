"""A job's events: messages, and the metrics of each step.

Every event is written while its job's row is locked, so that sequence numbers rise in the order in which
they become visible.
"""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import insert, select
from sqlalchemy.orm import Session

from olora_core.progress import Note

from .models import Event, new_id
from .pages import RowPage, read_page


def add_notes(session: Session, job_id: str, *notes: Note) -> None:
    if notes:
        rows = [event_row(job_id, note.level, "message", note.message, note.data) for note in notes]
        session.execute(insert(Event), rows)


def event_row(
    job_id: str, level: str, type: str, message: str, data: dict[str, Any] | None
) -> dict[str, Any]:
    return {
        "id": new_id("ftevent-"),
        "job_id": job_id,
        "level": level,
        "type": type,
        "message": storable(message),
        "data": data,
    }


def storable(text: str) -> str:
    """The text without NUL, which a quoted training file may contain and PostgreSQL cannot store."""
    return text.replace("\x00", "\ufffd")


def list_events(
    session: Session, job_id: str, *, after: str | None = None, limit: int = 20
) -> RowPage[Event]:
    """Newest first."""
    return read_page(session, select(Event), Event, within=Event.job_id == job_id, after=after, limit=limit)


def events_since(session: Session, job_id: str, seq: int = 0, limit: int = 1000) -> Sequence[Event]:
    """The events after a sequence number, oldest first."""
    rows = select(Event).where(Event.job_id == job_id, Event.seq > seq).order_by(Event.seq).limit(limit)
    return session.scalars(rows).all()
