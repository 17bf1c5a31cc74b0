"""The workers, as they describe themselves, and the jobs that wait for one in vain."""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, and_, delete, exists, select, update
from sqlalchemy.orm import Session

from olora_core.progress import Note

from .events import add_notes
from .kinds import KINDS
from .models import Job, Worker
from .session import db_now

REPORT_SECONDS = 15.0
"""How often a worker says that it is there."""
MISSED_SECONDS = 60.0
"""A job that has waited this long while no worker reported gets an event that says so."""
GONE_SECONDS = 86400.0


@dataclass(frozen=True)
class WorkerFacts:
    """What a worker says of itself; see the columns of `Worker`."""

    id: str
    host: str
    device: str
    memory_bytes: int | None
    versions: dict[str, Any]


def report(session: Session, facts: WorkerFacts, job_id: str | None) -> None:
    """Records that a worker is there, and what it works on."""
    seen = update(Worker).where(Worker.id == facts.id).values(seen_at=db_now(), job_id=job_id)
    if session.execute(seen.returning(Worker.id)).first() is None:
        session.add(Worker(**vars(facts), job_id=job_id))


def leave(session: Session, worker_id: str) -> None:
    """Removes a worker that ends."""
    session.execute(delete(Worker).where(Worker.id == worker_id))


def forget_lost(session: Session) -> None:
    """Removes workers that have not been seen for a day."""
    session.execute(delete(Worker).where(Worker.seen_at < db_now() - GONE_SECONDS))


def waits_in_vain() -> ColumnElement[bool]:
    """Has waited in the queue, and no worker was seen meanwhile."""
    seen = exists().where(Worker.seen_at > db_now() - MISSED_SECONDS)
    return and_(Job.status == "queued", Job.waiting_since < db_now() - MISSED_SECONDS, ~seen)


def tell_waiting(session: Session) -> int:
    """Tells the owners of jobs that wait in vain, once each time a job waits. Returns how many."""
    jobs = session.scalars(select(Job).where(waits_in_vain()).with_for_update(skip_locked=True)).all()
    for job in jobs:
        job.waiting_since = None
        sentence = (
            f"The {KINDS[job.kind].word} waits, and no worker has been seen for {MISSED_SECONDS:.0f} s. "
            "Start one with `olora serve` or `olora worker`."
        )
        add_notes(session, job.id, Note("warn", sentence))
    return len(jobs)
