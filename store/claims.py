"""Who works on a job: claims, leases and the fence.

A claim increments `attempt` and sets a lease by the database's clock. Whoever claimed writes only through
`write_as`, which succeeds while it holds that lease. A job that is paused or cancelled is held until its
trainer has stopped.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import ColumnElement, Engine, and_, func, or_, select, update
from sqlalchemy.orm import Session

from olora_core.progress import Note

from .errors import LeaseLost
from .events import add_notes
from .kinds import KINDS, Kind, Work
from .models import Attempt, File, Job, Project
from .session import db_now, reader

StopRequest = Literal["cancel", "pause"]


@dataclass(frozen=True)
class Claim:
    """One attempt's hold on a job. `spec` is resolved ("auto" replaced) once an attempt has done so."""

    job_id: str
    attempt: int
    owner: str
    project_id: str
    kind: Kind
    spec: Work
    resolved: bool
    training_key: str
    validation_key: str | None
    integrations: Sequence[Any] = ()


def claimable() -> ColumnElement[bool]:
    """Queued, held by nobody and, after a crash, past its back-off."""
    rested = or_(Job.not_before.is_(None), Job.not_before <= db_now())
    return and_(Job.status == "queued", Job.lease_owner.is_(None), rested)


def lease_expired() -> ColumnElement[bool]:
    """Held, in whatever status, by an attempt that has not renewed its lease."""
    return or_(Job.lease_until < db_now(), and_(Job.status == "running", Job.lease_until.is_(None)))


def claim(session: Session, *, owner: str, lease_seconds: float) -> Claim | None:
    """Claims the best job: highest priority, then the project that has waited longest, then the oldest job.

    One conditional UPDATE, so that only one of several concurrent claims gets the job. Returns None if there
    is no job. Call it first in its transaction.
    """
    if not _worth_trying(session):
        return None
    best = (
        select(Job.seq)
        .join(Project, Project.id == Job.project_id)
        .where(claimable())
        .order_by(Job.priority.desc(), Project.last_turn_at, Job.seq)
        .limit(1)
        .with_for_update(skip_locked=True, of=Job)
    )
    job = session.scalar(
        update(Job)
        .where(Job.seq == best.scalar_subquery(), Job.status == "queued", Job.lease_owner.is_(None))
        .values(
            status="running",
            attempt=Job.attempt + 1,
            lease_owner=owner,
            lease_until=db_now() + lease_seconds,
            started_at=func.coalesce(Job.started_at, db_now()),
            not_before=None,
            waiting_since=None,
        )
        .returning(Job)
        .execution_options(populate_existing=True)
    )
    if job is None:
        return None
    session.execute(update(Project).where(Project.id == job.project_id).values(last_turn_at=db_now()))
    session.add(Attempt(job_id=job.id, attempt=job.attempt, owner=owner))
    if job.attempt == 1:
        add_notes(session, job.id, Note("info", f"{KINDS[job.kind].noun.capitalize()} started"))
    return _claim_of(session, job, owner)


def _worth_trying(session: Session) -> bool:
    """On SQLite checks without a lock first, so that idle workers do not block writers."""
    engine = session.get_bind()
    if not isinstance(engine, Engine) or engine.dialect.name != "sqlite":
        return True
    with reader(engine).connect() as connection:
        return connection.scalar(select(Job.seq).where(claimable()).limit(1)) is not None


def _claim_of(session: Session, job: Job, owner: str) -> Claim:
    files = select(File).where(File.id.in_([job.training_file, job.validation_file]))
    keys = {file.id: file.storage_key for file in session.scalars(files)}
    kind = KINDS[job.kind]
    return Claim(
        job_id=job.id,
        attempt=job.attempt,
        owner=owner,
        project_id=job.project_id,
        kind=kind,
        spec=kind.spec.model_validate(job.resolved or job.spec),
        resolved=job.resolved is not None,
        training_key=keys[job.training_file] or "",
        validation_key=keys[job.validation_file] if job.validation_file else None,
        integrations=job.integrations or (),
    )


def renew(session: Session, claim: Claim, lease_seconds: float) -> StopRequest | None:
    """Extends the lease. Returns the owner's stop request, if any. Raises LeaseLost."""
    return stop_request(write_as(session, claim, lease_until=db_now() + lease_seconds).status)


def stop_request(status: str) -> StopRequest | None:
    """What the status of a job asks of the attempt that holds it."""
    if status == "running":
        return None
    return "cancel" if status == "cancelled" else "pause"  # also if it has been resumed meanwhile


def write_as(session: Session, claim: Claim, **values: Any) -> Job:
    """The fenced UPDATE with which every write of an attempt begins; it also locks the row.

    Raises LeaseLost if this attempt no longer holds the job.
    """
    fenced = update(Job).where(held_by(claim)).values(**{"lease_owner": claim.owner, **values}).returning(Job)
    job = session.scalar(fenced.execution_options(populate_existing=True))
    if job is None:
        raise LeaseLost(claim.job_id, claim.attempt)
    return job


def held_by(claim: Claim) -> ColumnElement[bool]:
    return and_(Job.id == claim.job_id, Job.attempt == claim.attempt, Job.lease_owner == claim.owner)
