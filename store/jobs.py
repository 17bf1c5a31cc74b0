"""The life cycle of a job: created, admitted, ended. Each transition is one short transaction.

The row is the only truth. `claims.py` says who works on a job, `progress.py` what is recorded meanwhile.
Comparisons share this life cycle; what only they have is in `comparisons.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from sqlalchemy import and_, func, select, update
from sqlalchemy.orm import Session

from olora_core.errors import OloraError
from olora_core.formats import Report, check_for_training
from olora_core.progress import Note

from .claims import Claim, lease_expired, write_as
from .errors import FileUnusable, JobStateError, NotFound, StoreError
from .events import add_notes, storable
from .files import lock_file, new_file_id, record_file
from .kinds import FINE_TUNING, KINDS, Kind, Work, kind_for
from .models import Attempt, File, Job, Model, new_id
from .pages import RowPage, read_page
from .progress import latest_checkpoint
from .session import db_now, settle
from .settings import Settings
from .statuses import WAITING

MAX_BACK_OFF_SECONDS = 60.0


@dataclass(frozen=True)
class ResultFile:
    """A produced file whose bytes are stored already."""

    filename: str
    bytes: int
    sha256: str
    storage_key: str


def create(
    session: Session,
    *,
    project_id: str,
    spec: Work,
    training_file: File,
    validation_file: File | None = None,
    suffix: str | None = None,
    metadata: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
    integrations: list[Any] | None = None,
    seed: int | None = None,
    notes: Sequence[Note] = (),
) -> Job:
    """Creates a job or comparison in `validating_files`. `seed` defaults to the spec's; `notes` are events.

    Raises NotFound if a file has been deleted meanwhile, FileUnusable if it is not a training file.
    """
    for file, param in ((training_file, "training_file"), (validation_file, "validation_file")):
        if file is not None:
            _check_purpose(file, param)
            lock_file(session, file)
    seed = spec.seed if seed is None else seed
    kind = kind_for(spec)
    job = Job(
        id=new_id(kind.prefix),
        project_id=project_id,
        kind=kind.name,
        status="validating_files",
        model=spec.model,
        training_file=training_file.id,
        validation_file=validation_file.id if validation_file else None,
        suffix=suffix,
        seed=seed,
        job_metadata=metadata,
        spec=spec.model_copy(update={"seed": seed}).model_dump(mode="json"),
        options=options or {},
        integrations=integrations,
    )
    session.add(job)
    session.flush()
    checked = f"Validating training file: {training_file.id}"
    if validation_file:
        checked += f" and validation file: {validation_file.id}"
    add_notes(session, job.id, Note("info", f"Created {kind.noun}: {job.id}"), Note("info", checked), *notes)
    return job


def _check_purpose(file: File, param: str) -> None:
    if file.purpose != "fine-tune":
        raise FileUnusable(
            f"File {file.id} has purpose {file.purpose!r}; upload it with purpose 'fine-tune'.",
            param=param,
            code=f"invalid_{param}",
        )


def admit(session: Session, settings: Settings) -> int:
    """Moves jobs from `validating_files` to `queued`, or to `failed`, according to their files' reports.

    The columns of a job that maps them are checked by its worker.
    Returns how many it moved.
    """
    waiting = select(Job).where(Job.status == "validating_files").order_by(Job.seq).limit(100)
    jobs = session.scalars(waiting.with_for_update(skip_locked=True)).all()
    for job in jobs:
        error = _file_error(session, job, settings)
        if error is not None:
            _end_failed(session, job, error_dict(error))
            continue
        job.status = "queued"
        add_notes(
            session, job.id, Note("info", f"Files validated, moving {KINDS[job.kind].word} to queued state")
        )
    session.flush()
    return len(jobs)


def _file_error(session: Session, job: Job, settings: Settings) -> OloraError | None:
    training = _report_of(session, job.training_file, "training_file")
    if not isinstance(training, Report):
        return training
    check = partial(
        check_for_training,
        type=job.spec["type"],
        literal=job.spec["hyperparameters"].get("control_tokens") == "text",
        is_mapped=bool(job.spec.get("columns")),
    )
    error = check(training, role="training", minimum_rows=settings.min_examples)
    if error is not None or job.validation_file is None:
        return error
    validation = _report_of(session, job.validation_file, "validation_file")
    if not isinstance(validation, Report):
        return validation
    return check(validation, role="validation", minimum_rows=1, training_format=training.format)


def _report_of(session: Session, file_id: str, param: str) -> Report | StoreError:
    file = session.scalar(select(File).where(File.id == file_id))
    code = f"invalid_{param}"
    if file is None or file.deleted_at is not None:
        return FileUnusable(f"File {file_id} has been deleted; upload it again.", param=param, code=code)
    if file.report is None:
        return FileUnusable(
            f"File {file_id} was not checked as training data; upload it with purpose 'fine-tune'.",
            param=param,
            code=code,
        )
    return Report.model_validate(file.report)


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
    job = complete(session, claim, files, f"New fine-tuned model created: {model}", **made)
    session.add(Model(id=model, project_id=job.project_id, job_id=job.id))
    session.flush()
    return job


def complete(session: Session, claim: Claim, files: Sequence[ResultFile], outcome: str, **result: Any) -> Job:
    """Ends a job or comparison that has succeeded. `outcome` becomes an event, `result` sets columns.

    Raises LeaseLost.
    """
    job = write_as(session, claim, status="succeeded", finished_at=db_now(), **result, **_NO_ATTEMPT)
    job.result_files = [_record_result(session, job, file).id for file in files]
    _end_attempt(session, job, "succeeded")
    ended = f"The {KINDS[job.kind].word} has successfully completed"
    add_notes(session, job.id, Note("info", outcome), Note("info", ended))
    settle(session, job)
    return job


_NO_ATTEMPT: dict[str, Any] = {
    "lease_owner": None,
    "lease_until": None,
    "stop_request": None,
    "estimated_finish": None,
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
    """Ends the job with an error for its owner. Raises LeaseLost."""
    job = write_as(session, claim)
    _end_failed(session, job, error_dict(error))
    return job


def cancelled(session: Session, claim: Claim) -> Job:
    """Ends the job after its trainer has stopped on request. Raises LeaseLost."""
    job = write_as(session, claim)
    _end_cancelled(session, job)
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

    `message` is a sentence that says what happened. Crashes count: `max_failures` in a row without a new
    checkpoint fail the job. Raises LeaseLost.
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
    if job.stop_request == "cancel":
        _end_cancelled(session, job)
        return
    job.failures += crashed
    checkpoint = latest_checkpoint(session, job.id)
    start = f"step {checkpoint.step}" if checkpoint else "the start"
    if crashed and job.failures >= max_failures:
        _end_failed(session, job, _gave_up(job, reason, message, start))
        return
    _end_attempt(session, job, reason)
    job.status = "queued"
    job.dispatches, job.dispatched_at = 0, None
    if crashed:
        job.not_before = db_now() + back_off(job.failures)
    _clear_attempt(job)
    data = {"reason": reason, "attempt": job.attempt, "step": job.step}
    data["resumes_from_step"] = checkpoint.step if checkpoint else 0
    onward = (
        f"Step {job.step} was reached; the {KINDS[job.kind].word} is queued again and resumes from {start}."
    )
    add_notes(session, job.id, Note("warn" if crashed else "info", f"{message} {onward}", data))
    settle(session, job)


def _gave_up(job: Job, reason: str, message: str, start: str) -> dict[str, Any]:
    times = "once" if job.failures == 1 else f"{job.failures} times"
    word = KINDS[job.kind].word
    sentence = f"The {word} failed {times} without a new checkpoint in between (the last one is {start})."
    return {"code": reason, "message": f"{sentence} Last error: {message}", "param": None}


def back_off(failures: int) -> float:
    """Seconds until a job is retried after its n-th crash in a row: 1, 2, 4, … 60."""
    return min(MAX_BACK_OFF_SECONDS, 2.0 ** (failures - 1))


def cancel(session: Session, job: Job) -> Job:
    """Ends a waiting job, asks a running one to stop; a cancelled one stays as it is.

    Raises JobStateError if the job has succeeded or failed.
    """
    current = session.scalar(
        select(Job).where(Job.id == job.id).with_for_update().execution_options(populate_existing=True)
    )
    assert current is not None
    if current.status in WAITING:
        _end_cancelled(session, current)
    elif current.status == "running":
        if current.stop_request != "cancel":
            current.stop_request = "cancel"
            add_notes(
                session,
                current.id,
                Note(
                    "info",
                    f"Cancellation requested; the {KINDS[current.kind].word} stops at its next step",
                ),
            )
    elif current.status != "cancelled":
        name = KINDS[current.kind].word.capitalize()
        raise JobStateError(f"{name} {current.id} cannot be cancelled: it has already {current.status}.")
    session.flush()
    return current


def _end_cancelled(session: Session, job: Job) -> None:
    job.status, job.finished_at = "cancelled", db_now()
    _end_attempt(session, job, "cancelled")
    _clear_attempt(job)
    add_notes(session, job.id, Note("info", f"The {KINDS[job.kind].word} has been cancelled"))
    settle(session, job)


def _end_failed(session: Session, job: Job, error: dict[str, Any]) -> None:
    job.status, job.finished_at = "failed", db_now()
    job.error = error
    _end_attempt(session, job, str(error["code"]))
    _clear_attempt(job)
    add_notes(session, job.id, Note("error", f"The {KINDS[job.kind].word} failed: {error['message']}"))
    settle(session, job)


def _clear_attempt(job: Job) -> None:
    for name, value in _NO_ATTEMPT.items():
        setattr(job, name, value)


def error_dict(error: OloraError) -> dict[str, Any]:
    return {"code": error.code, "message": storable(error.message), "param": error.param}


def _end_attempt(session: Session, job: Job, reason: str) -> None:
    session.execute(
        update(Attempt)
        .where(Attempt.job_id == job.id, Attempt.attempt == job.attempt, Attempt.ended_at.is_(None))
        .values(ended_at=db_now(), end_reason=reason[:64])
    )


def get_job(session: Session, project_id: str, job_id: str, kind: Kind = FINE_TUNING) -> Job:
    """Raises NotFound, also for another project's job and for one of another kind."""
    job = session.scalar(
        select(Job).where(Job.id == job_id, Job.project_id == project_id, Job.kind == kind.name)
    )
    if job is None:
        raise NotFound(f"No such {kind.noun}: {job_id}.", param=kind.param)
    return job


def leaves_model(job: Job) -> bool:
    """Whether the job exports the whole model, with the adapter merged into it."""
    return bool(job.spec["adapter"].get("export") == "merged")


def list_jobs(
    session: Session,
    project_id: str,
    *,
    kind: Kind = FINE_TUNING,
    metadata: Mapping[str, str] | Literal["null"] | None = None,
    after: str | None = None,
    limit: int = 20,
) -> RowPage[Job]:
    """Jobs of one kind, newest first: those with all pairs of `metadata`, or, if "null", without any."""
    rows = select(Job)
    if metadata == "null":
        rows = rows.where(Job.job_metadata.is_(None))
    elif metadata:
        for key, value in metadata.items():
            rows = rows.where(_has_pair(session, key, value))
    within = and_(Job.project_id == project_id, Job.kind == kind.name)
    return read_page(session, rows, Job, within=within, after=after, limit=limit)


def _has_pair(session: Session, key: str, value: str) -> Any:
    each = func.json_each if session.get_bind().dialect.name == "sqlite" else func.json_each_text
    pairs = each(Job.job_metadata).table_valued("key", "value")
    return select(1).select_from(pairs).where(pairs.c.key == key, pairs.c.value == value).exists()
