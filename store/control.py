"""What a job's owner may ask for while it has not ended: cancel, pause, resume.

Each takes effect at once. A running trainer gets to know of it within a second; until it has stopped, its
attempt holds the job, and nobody else can claim it.
"""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from olora_core.progress import Note

from .claims import Claim, write_as
from .endings import end_cancelled, enqueue
from .errors import JobStateError
from .events import add_notes
from .jobs import admit_one
from .kinds import KINDS
from .models import Job
from .session import db_now, settle
from .settings import Settings
from .statuses import ENDED


def cancel(session: Session, job: Job) -> Job:
    """Ends the job; a cancelled one stays as it is. Raises JobStateError if it has succeeded or failed."""
    current = _locked(session, job)
    if current.status != "cancelled":
        _require_unfinished(current, "cancelled")
        end_cancelled(session, current)
    return current


def pause(session: Session, job: Job, settings: Settings) -> Job:
    """Takes a job from the queue or its trainer, which first saves a checkpoint; a paused one stays so.

    Raises JobStateError if it has ended.
    """
    current = _locked(session, job)
    _require_unfinished(current, "paused")
    if current.status == "validating_files":
        admit_one(session, current, settings)
        _require_unfinished(current, "paused")
    if current.status != "paused":
        _pause(session, current, "request", f"The {KINDS[current.kind].word} was paused.")
    return current


def pause_at_limit(session: Session, claim: Claim, reason: str, message: str) -> None:
    """Pauses a running job that has reached one of its limits. `reason` names it. Raises LeaseLost."""
    job = write_as(session, claim)
    if job.status == "running":
        _pause(session, job, reason, message)


def _pause(session: Session, job: Job, reason: str, message: str) -> None:
    job.status, job.pause_reason = "paused", reason
    job.estimated_finish = job.waiting_since = None
    add_notes(session, job.id, Note("info", message, {"reason": reason}))
    settle(session, job)


def resume(session: Session, job: Job, limits: Mapping[str, Any] | None = None) -> Job:
    """Queues a paused job; one that is not paused stays as it is. `limits` replace the ones in its options.

    Its limits begin anew: they count what comes from now on, and a `finish_by` that has passed is dropped.
    Raises JobStateError if it has ended.
    """
    current = _locked(session, job)
    _require_unfinished(current, "resumed")
    if current.status != "paused":
        return current
    options = {**current.options, **(limits or {})}
    finish_by = options.get("finish_by")
    if finish_by is not None and finish_by <= session.scalar(select(db_now())):
        options["finish_by"] = None
    current.options = options
    current.limits_from_attempt, current.limits_from_step = current.attempt, current.step
    current.failures = 0
    enqueue(current)
    add_notes(session, current.id, Note("info", f"The {KINDS[current.kind].word} was resumed and is queued"))
    settle(session, current)
    return current


def _locked(session: Session, job: Job) -> Job:
    """The job's row as it is now, locked."""
    row = select(Job).where(Job.id == job.id).with_for_update().execution_options(populate_existing=True)
    return session.scalars(row).one()


def _require_unfinished(job: Job, wanted: str) -> None:
    if job.status in ENDED:
        name = KINDS[job.kind].word.capitalize()
        has = "it was cancelled" if job.status == "cancelled" else f"it has already {job.status}"
        raise JobStateError(f"{name} {job.id} cannot be {wanted}: {has}.")
