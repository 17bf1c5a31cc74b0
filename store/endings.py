"""How attempts and jobs end: with a result, an error, a cancellation, or back in the queue."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from olora_core.errors import OloraError
from olora_core.progress import Note

from .claims import Claim, lease_expired, write_as
from .events import add_notes, storable
from .files import new_file_id, record_file
from .kinds import KINDS
from .models import Attempt, File, Job, Model
from .progress import latest_checkpoint
from .session import db_now, settle
from .settings import Settings

MAX_BACK_OFF_SECONDS = 60.0


@dataclass(frozen=True)
class ResultFile:
    """A produced file whose bytes are stored already."""

    filename: str
    bytes: int
    sha256: str
    storage_key: str


def succeed(
    session: Session,
    claim: Claim,
    *,
    files: Sequence[ResultFile],
    model: str,
    certificate: dict[str, Any],
    trained_tokens: int,
) -> Job:
    """Ends the job with its result files, its model and its certificate.

    `files` are the CSV, the adapter (or the merged model) and the TensorBoard file, in this order.
    Raises LeaseLost; then nothing is written.
    """
    made = {"fine_tuned_model": model, "certificate": certificate, "trained_tokens": trained_tokens}
    outcome = Note("info", f"New fine-tuned model created: {model}", {"fine_tuned_model": model})
    job = complete(session, claim, files, outcome, **made)
    if job.status == "succeeded":
        session.add(Model(id=model, project_id=job.project_id, job_id=job.id))
        session.flush()
    return job


def complete(
    session: Session, claim: Claim, files: Sequence[ResultFile], outcome: Note, **result: Any
) -> Job:
    """Ends a job or comparison that has succeeded. `outcome` becomes an event, `result` sets columns.

    One that was cancelled or paused meanwhile stays so, without the results. Raises LeaseLost.
    """
    job = write_as(session, claim)
    if job.status != "running":
        _let_go(session, job)
        return job
    job.status, job.finished_at = "succeeded", db_now()
    for name, value in result.items():
        setattr(job, name, value)
    job.result_files = [_record_result(session, job, file).id for file in files]
    _end_attempt(session, job, "succeeded")
    ended = f"The {KINDS[job.kind].word} has successfully completed"
    add_notes(session, job.id, outcome, Note("info", ended))
    settle(session, job)
    return job


_NO_ATTEMPT: dict[str, Any] = {
    "lease_owner": None,
    "lease_until": None,
    "estimated_finish": None,
    "stage": None,
}
"""The columns that are null while no attempt runs."""


def _record_result(session: Session, job: Job, file: ResultFile) -> File:
    return record_file(
        session,
        file_id=new_file_id(),
        project_id=job.project_id,
        filename=file.filename,
        purpose="fine-tune-results",
        bytes=file.bytes,
        sha256=file.sha256,
        storage_key=file.storage_key,
    )


def fail(session: Session, claim: Claim, error: OloraError) -> Job:
    """Ends the job with an error for its owner, unless it was cancelled or paused meanwhile.

    Raises LeaseLost.
    """
    job = write_as(session, claim)
    if job.status == "running":
        end_failed(session, job, error_dict(error))
    else:
        _let_go(session, job, f"The {KINDS[job.kind].word} would have failed: {error.message}")
    return job


def hand_back(
    session: Session,
    claim: Claim,
    *,
    reason: str,
    message: str,
    crashed: bool = False,
    max_failures: int = 3,
) -> Job:
    """Ends the attempt and queues the job again; another attempt resumes from the last checkpoint.

    One that its owner has paused or cancelled stays so. `message` is a sentence that says what happened.
    Crashes count: `max_failures` in a row without a new checkpoint fail the job. Raises LeaseLost.
    """
    job = write_as(session, claim)
    _release(session, job, reason, message, crashed, max_failures)
    return job


def sweep(session: Session, settings: Settings) -> int:
    """Takes jobs from attempts whose lease has expired. Returns how many."""
    jobs = session.scalars(select(Job).where(lease_expired()).with_for_update(skip_locked=True)).all()
    for job in jobs:
        message = f"Worker {job.lease_owner} was lost: it did not renew its lease."
        _release(session, job, "lease_lost", message, True, settings.max_failures)
    return len(jobs)


def _release(session: Session, job: Job, reason: str, message: str, crashed: bool, max_failures: int) -> None:
    if job.status != "running":
        _let_go(session, job, message if crashed else None)
        return
    job.failures += crashed
    checkpoint = latest_checkpoint(session, job.id)
    start = f"step {checkpoint.step}" if checkpoint else "the start"
    if crashed and job.failures >= max_failures:
        end_failed(session, job, _gave_up(job, reason, message, start))
        return
    _end_attempt(session, job, reason)
    enqueue(job)
    if crashed:
        job.not_before = db_now() + back_off(job.failures)
    data = {"reason": reason, "attempt": job.attempt, "step": job.step}
    data["resumes_from_step"] = checkpoint.step if checkpoint else 0
    onward = (
        f"Step {job.step} was reached; the {KINDS[job.kind].word} is queued again and resumes from {start}."
    )
    add_notes(session, job.id, Note("warn" if crashed else "info", f"{message} {onward}", data))
    settle(session, job)


def _let_go(session: Session, job: Job, trouble: str | None = None) -> None:
    """The attempt at a job that was paused or cancelled has stopped: its device is free.

    Nothing is said of a cancelled job: its last event was its cancellation.
    """
    _end_attempt(session, job, job.status)
    if job.status != "cancelled":
        checkpoint = latest_checkpoint(session, job.id)
        start = f"step {checkpoint.step}" if checkpoint else "the start"
        word = KINDS[job.kind].word
        now = f"The {word} is paused" if job.status == "paused" else f"The paused {word} is queued again"
        sentence = f"{now} and holds no device; it resumes from {start}."
        data = {"step": job.step, "resumes_from_step": checkpoint.step if checkpoint else 0}
        note = Note("warn" if trouble else "info", f"{trouble} {sentence}" if trouble else sentence, data)
        add_notes(session, job.id, note)
    settle(session, job)


def _gave_up(job: Job, reason: str, message: str, start: str) -> dict[str, Any]:
    times = "once" if job.failures == 1 else f"{job.failures} times"
    word = KINDS[job.kind].word
    sentence = f"The {word} failed {times} without a new checkpoint in between (the last one is {start})."
    return {"code": reason, "message": f"{sentence} Last error: {message}", "param": None}


def back_off(failures: int) -> float:
    """Seconds until a job is retried after its n-th crash in a row: 1, 2, 4, … 60."""
    return min(MAX_BACK_OFF_SECONDS, 2.0 ** (failures - 1))


def enqueue(job: Job) -> None:
    """Puts a job in the queue."""
    job.status, job.waiting_since = "queued", db_now()
    job.dispatches, job.dispatched_at = 0, None
    job.not_before = job.pause_reason = None


def end_cancelled(session: Session, job: Job) -> None:
    """Ends the job at once. An attempt that holds it keeps it until its trainer has stopped."""
    job.status, job.finished_at = "cancelled", db_now()
    job.estimated_finish = job.waiting_since = job.pause_reason = None
    add_notes(session, job.id, Note("info", f"The {KINDS[job.kind].word} has been cancelled"))
    settle(session, job)


def end_failed(session: Session, job: Job, error: dict[str, Any]) -> None:
    job.status, job.finished_at = "failed", db_now()
    job.error = error
    _end_attempt(session, job, str(error["code"]))
    add_notes(session, job.id, Note("error", f"The {KINDS[job.kind].word} failed: {error['message']}"))
    settle(session, job)


def error_dict(error: OloraError) -> dict[str, Any]:
    return {"code": error.code, "message": storable(error.message), "param": error.param}


def _end_attempt(session: Session, job: Job, reason: str) -> None:
    session.execute(
        update(Attempt)
        .where(Attempt.job_id == job.id, Attempt.attempt == job.attempt, Attempt.ended_at.is_(None))
        .values(ended_at=db_now(), end_reason=reason[:64])
    )
    for name, value in _NO_ATTEMPT.items():
        setattr(job, name, value)
