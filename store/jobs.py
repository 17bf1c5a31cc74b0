"""The life of a job: created, admitted, claimed, recorded, ended. Each transition is one short transaction.

The row is the truth. A claim raises `attempt` and sets a lease by the database's clock; whoever claimed
writes only while `attempt` is his and the status is running. Every event of a job is written while its row
is locked, so that their sequence numbers rise in the order in which they become visible.
"""

import csv
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from sqlalchemy import ColumnElement, Engine, Select, and_, case, func, insert, or_, select, update
from sqlalchemy.orm import Session

from olora_core.errors import OloraError
from olora_core.formats import Report, check_for_training
from olora_core.specs import TrainSpec

from .errors import FileUnusable, JobStateError, LeaseLost, NotFound, StoreError
from .files import lock_file, new_file_id, record_file
from .models import Attempt, Checkpoint, Event, File, Job, Metric, Model, Project, new_id
from .pages import Page, read_page
from .session import db_now, reader, settle
from .settings import Settings

Wish = Literal["cancel"]
ENDED = ("succeeded", "failed", "cancelled")
KEPT_CHECKPOINTS = 2
MAX_BACK_OFF_SECONDS = 60.0
CSV_HEADER = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")
METRIC_NAMES = {
    "loss": "train_loss",
    "accuracy": "train_mean_token_accuracy",
    "valid_accuracy": "valid_mean_token_accuracy",
    "full_valid_accuracy": "full_valid_mean_token_accuracy",
}
"""The trainer's names of a step's numbers, and those that clients read."""
SHOWN = (
    "step",
    "total_steps",
    "train_loss",
    "train_mean_token_accuracy",
    "valid_loss",
    "valid_mean_token_accuracy",
    "full_valid_loss",
    "full_valid_mean_token_accuracy",
    "tokens",
    "seconds",
)
"""What a metrics event carries of a step: OpenAI's names, and what a progress bar needs for its speed."""


class Notice(Protocol):
    """Something to tell a job's owner: a `Note` of the trainer, or one of ours."""

    @property
    def level(self) -> str: ...
    @property
    def message(self) -> str: ...
    @property
    def data(self) -> dict[str, Any] | None: ...


@dataclass(frozen=True)
class Note:
    level: str
    message: str
    data: dict[str, Any] | None = None


@dataclass(frozen=True)
class Claim:
    """An attempt that holds a job. `spec` has its "auto" values resolved if an earlier attempt did so."""

    job_id: str
    attempt: int
    owner: str
    project_id: str
    spec: TrainSpec
    resolved: bool
    training_key: str
    validation_key: str | None


@dataclass(frozen=True)
class ResultFile:
    """A produced file whose bytes are stored already."""

    filename: str
    bytes: int
    sha256: str
    storage_key: str


# --- creation and admission ----------------------------------------------------------------------------


def create(
    session: Session,
    *,
    project_id: str,
    spec: TrainSpec,
    training_file: File,
    validation_file: File | None = None,
    suffix: str | None = None,
    metadata: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
    seed: int | None = None,
    notes: Sequence[Notice] = (),
) -> Job:
    """A new job in `validating_files`. `seed` is the spec's own unless given; `notes` become its events.

    Raises NotFound when a file was deleted meanwhile and FileUnusable when it is no training file.
    """
    for file, param in ((training_file, "training_file"), (validation_file, "validation_file")):
        if file is not None:
            _check_purpose(file, param)
            lock_file(session, file)
    seed = spec.seed if seed is None else seed
    job = Job(
        id=new_id("ftjob-"),
        project_id=project_id,
        status="validating_files",
        model=spec.model,
        training_file=training_file.id,
        validation_file=validation_file.id if validation_file else None,
        suffix=suffix,
        seed=seed,
        job_metadata=metadata,
        spec=spec.model_copy(update={"seed": seed}).model_dump(mode="json"),
        options=options or {},
    )
    session.add(job)
    session.flush()
    checked = f"Validating training file: {training_file.id}"
    if validation_file:
        checked += f" and validation file: {validation_file.id}"
    _tell(session, job.id, Note("info", f"Created fine-tuning job: {job.id}"), Note("info", checked), *notes)
    return job


def _check_purpose(file: File, param: str) -> None:
    if file.purpose != "fine-tune":
        raise FileUnusable(
            f"File {file.id} has purpose {file.purpose!r}; upload it with purpose 'fine-tune'.",
            param=param,
            code=f"invalid_{param}",
        )


def admit(session: Session, settings: Settings) -> int:
    """Moves jobs from `validating_files` to `queued`, or to `failed`, by their files' stored reports.

    Returns how many it moved.
    """
    waiting = select(Job).where(Job.status == "validating_files").order_by(Job.seq).limit(100)
    jobs = session.scalars(waiting.with_for_update(skip_locked=True)).all()
    for job in jobs:
        error = _what_is_wrong_with_files(session, job, settings)
        if error is not None:
            _end_failed(session, job, error_dict(error))
            continue
        job.status = "queued"
        _tell(session, job.id, Note("info", "Files validated, moving job to queued state"))
    session.flush()
    return len(jobs)


def _what_is_wrong_with_files(
    session: Session, job: Job, settings: Settings
) -> OloraError | StoreError | None:
    training = _report_of(session, job.training_file, "training_file")
    if not isinstance(training, Report):
        return training
    error = check_for_training(training, role="training", minimum_rows=settings.min_examples)
    if error is not None or job.validation_file is None:
        return error
    validation = _report_of(session, job.validation_file, "validation_file")
    if not isinstance(validation, Report):
        return validation
    return check_for_training(validation, role="validation", minimum_rows=1, training_format=training.format)


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


# --- claim and lease -----------------------------------------------------------------------------------


def claimable() -> ColumnElement[bool]:
    """Queued, and rested if it crashed."""
    return and_(Job.status == "queued", or_(Job.not_before.is_(None), Job.not_before <= db_now()))


def lease_is_over() -> ColumnElement[bool]:
    return and_(Job.status == "running", or_(Job.lease_until.is_(None), Job.lease_until < db_now()))


def claim(session: Session, *, owner: str, lease_seconds: float) -> Claim | None:
    """Takes the best claimable job: highest priority, then the project that waited longest, then age.

    One conditional UPDATE; of several who try, one gets the job. None when there is nothing to do.
    Call it first in its transaction.
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
        .where(Job.seq == best.scalar_subquery(), Job.status == "queued")
        .values(
            status="running",
            attempt=Job.attempt + 1,
            lease_owner=owner,
            lease_until=db_now() + lease_seconds,
            started_at=func.coalesce(Job.started_at, db_now()),
            not_before=None,
        )
        .returning(Job)
        .execution_options(populate_existing=True)
    )
    if job is None:
        return None
    session.execute(update(Project).where(Project.id == job.project_id).values(last_turn_at=db_now()))
    session.add(Attempt(job_id=job.id, attempt=job.attempt, owner=owner))
    if job.attempt == 1:
        _tell(session, job.id, Note("info", "Fine-tuning job started"))
    return _claim_of(session, job, owner)


def _worth_trying(session: Session) -> bool:
    """On SQLite a look that takes no lock, so that idle workers do not stand in the writers' way."""
    engine = session.get_bind()
    if not isinstance(engine, Engine) or engine.dialect.name != "sqlite":
        return True
    with reader(engine).connect() as connection:
        return connection.scalar(select(Job.seq).where(claimable()).limit(1)) is not None


def _claim_of(session: Session, job: Job, owner: str) -> Claim:
    wanted = select(File).where(File.id.in_([job.training_file, job.validation_file]))
    keys = {file.id: file.storage_key for file in session.scalars(wanted)}
    return Claim(
        job_id=job.id,
        attempt=job.attempt,
        owner=owner,
        project_id=job.project_id,
        spec=TrainSpec.model_validate(job.resolved or job.spec),
        resolved=job.resolved is not None,
        training_key=keys[job.training_file] or "",
        validation_key=keys[job.validation_file] if job.validation_file else None,
    )


def _mine(claim: Claim) -> ColumnElement[bool]:
    return and_(Job.id == claim.job_id, Job.attempt == claim.attempt, Job.status == "running")


def _write(session: Session, claim: Claim, **values: Any) -> Job:
    """The fenced UPDATE that every write of an attempt begins with; it also locks the row.

    Raises LeaseLost when the job is no longer this attempt's.
    """
    fenced = update(Job).where(_mine(claim)).values(**{"status": "running", **values}).returning(Job)
    job = session.scalar(fenced.execution_options(populate_existing=True))
    if job is None:
        raise LeaseLost(claim.job_id, claim.attempt)
    return job


def renew(session: Session, claim: Claim, lease_seconds: float) -> Wish | None:
    """Holds the job for longer. Returns the owner's wish. Raises LeaseLost."""
    job = _write(session, claim, lease_until=db_now() + lease_seconds)
    return "cancel" if job.requested == "cancel" else None


# --- progress ------------------------------------------------------------------------------------------


def record(
    session: Session,
    claim: Claim,
    *,
    steps: Sequence[Mapping[str, Any]] = (),
    evaluations: Sequence[Mapping[str, Any]] = (),
    events: Sequence[Notice] = (),
    resolved: TrainSpec | None = None,
    total_steps: int | None = None,
    estimated_finish: float | None = None,
) -> None:
    """Writes down progress. A step that was recorded before, by whichever attempt, leaves no second trace.

    `steps` carry the names of the trainer's `Step` (step, loss, accuracy, valid_loss, seconds, …),
    `evaluations` those of its `Evaluated` (step, loss, accuracy over the whole validation file).
    What the first attempt resolved, stays. Raises LeaseLost.
    """
    reached = max((int(step["step"]) for step in steps), default=0)
    job = _write(session, claim, step=_greatest(Job.step, reached))
    if total_steps is not None:
        job.total_steps = total_steps
    if resolved is not None and job.resolved is None:
        job.resolved = resolved.model_dump(mode="json")
    notes = list(events)
    new = _new_metrics(session, job, steps, evaluations, notes)
    _tell(session, job.id, *notes)
    _tell_metrics(session, job, new)
    if estimated_finish is not None:
        job.estimated_finish = estimated_finish
    elif steps:
        _estimate(session, job)
    session.flush()


def _greatest(column: Any, value: int) -> Any:
    """The larger of the two, in words that both databases know."""
    return case((column < value, value), else_=column)


def _new_metrics(
    session: Session,
    job: Job,
    steps: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Mapping[str, Any]],
    notes: list[Notice],
) -> list[dict[str, Any]]:
    """Inserts what is new and returns it; `notes` grows by a warning for each number that is not finite."""
    rows = {row.step: row for row in _metric_rows(session, job.id, [*steps, *evaluations])}
    new: dict[int, dict[str, Any]] = {}
    for step in steps:
        number = int(step["step"])
        if number not in rows and number not in new:
            new[number] = finite(_named(step), number, notes)
    for evaluation in evaluations:
        number = int(evaluation["step"])
        measured = finite(
            {"full_valid_loss": evaluation["loss"], "full_valid_mean_token_accuracy": evaluation["accuracy"]},
            number,
            notes,
        )
        if number in new:
            new[number].update(measured)
        elif number not in rows or "full_valid_loss" not in rows[number].values:
            known = rows[number].values if number in rows else {"step": number}
            new[number] = {**known, **measured}
    for number, values in new.items():
        if number in rows:
            rows[number].values = values
        else:
            session.add(Metric(job_id=job.id, step=number, values=values))
    return [new[number] for number in sorted(new)]


def _metric_rows(session: Session, job_id: str, measured: Iterable[Mapping[str, Any]]) -> Sequence[Metric]:
    numbers = {int(values["step"]) for values in measured}
    if not numbers:
        return []
    return session.scalars(select(Metric).where(Metric.job_id == job_id, Metric.step.in_(numbers))).all()


def _named(step: Mapping[str, Any]) -> dict[str, Any]:
    return {METRIC_NAMES.get(name, name): value for name, value in step.items() if value is not None}


def finite(values: Mapping[str, Any], step: int, notes: list[Notice]) -> dict[str, Any]:
    """NaN and Infinity are not JSON: they become null, and a warning."""
    clean = dict(values)
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            clean[name] = None
            notes.append(Note("warn", f"Step {step}: {name} is not a finite number ({value})."))
    return clean


def _tell_metrics(session: Session, job: Job, new: Sequence[dict[str, Any]]) -> None:
    rows = []
    for values in new:
        data = {name: values[name] for name in SHOWN if name in values}
        data.setdefault("total_steps", job.total_steps)
        rows.append(_event(job.id, "info", "metrics", step_sentence(data), data))
    if rows:
        session.execute(insert(Event), rows)


def step_sentence(data: Mapping[str, Any]) -> str:
    """`Step 60/200: training loss=0.73, validation loss=1.46`"""
    names = (
        ("train_loss", "training loss"),
        ("valid_loss", "validation loss"),
        ("full_valid_loss", "full validation loss"),
    )
    losses = [
        f"{words}={'nan' if data[name] is None else format(data[name], '.2f')}"
        for name, words in names
        if name in data
    ]
    return f"Step {data['step']}/{data.get('total_steps') or '?'}: {', '.join(losses)}"


def _estimate(session: Session, job: Job) -> None:
    """From the mean duration of the last twenty steps."""
    if not job.total_steps:
        return
    last = select(Metric.values).where(Metric.job_id == job.id).order_by(Metric.step.desc()).limit(20)
    seconds = [v["seconds"] for v in session.scalars(last) if isinstance(v.get("seconds"), int | float)]
    if seconds:
        left = max(0, job.total_steps - job.step) * sum(seconds) / len(seconds)
        job.estimated_finish = db_now() + left


def add_checkpoint(
    session: Session, claim: Claim, step: int, metrics: Mapping[str, Any], storage_key: str
) -> list[str]:
    """Records a stored checkpoint. Returns the storage keys that no row names any more: two are kept.

    Progress beyond every earlier checkpoint sets the count of failures back. Raises LeaseLost.
    """
    job = _write(session, claim, step=_greatest(Job.step, step))
    furthest = session.scalar(select(func.max(Checkpoint.step)).where(Checkpoint.job_id == job.id))
    if furthest is None or step > furthest:
        job.failures = 0
    notes: list[Notice] = []
    checkpoint = Checkpoint(
        id=new_id("ftckpt_"),
        job_id=job.id,
        attempt=claim.attempt,
        step=step,
        metrics=finite(_named({"step": step, **metrics}), step, notes),
        storage_key=storage_key,
    )
    session.add(checkpoint)
    session.flush()
    return _prune(session, job.id)


def _prune(session: Session, job_id: str) -> list[str]:
    pruned = []
    steps: set[int] = set()
    for checkpoint in stored_checkpoints(session, job_id):
        if checkpoint.step in steps or len(steps) == KEPT_CHECKPOINTS:
            assert checkpoint.storage_key is not None
            pruned.append(checkpoint.storage_key)
            checkpoint.storage_key = None
        steps.add(checkpoint.step)
    session.flush()
    return pruned


# --- the ways to end -----------------------------------------------------------------------------------


def model_name(base: str, organization: str, suffix: str | None, job_id: str) -> str:
    """`ft:<base>:<organization>:<suffix or empty>:<8 characters of the job's id>`, without a slash.

    A job's name is known from its beginning, so that its checkpoints can be called after it.
    """
    return f"ft:{slug(base)}:{organization}:{slug(suffix or '')}:{job_id[-8:]}"


def slug(text: str) -> str:
    """`meta-llama/Llama-3.2-1B` → `meta-llama--llama-3.2-1b`"""
    return re.sub(r"[^a-z0-9._-]+", "-", text.replace("/", "--").lower())


def succeed(
    session: Session,
    claim: Claim,
    *,
    files: Sequence[ResultFile],
    model: str,
    certificate: dict[str, Any],
    trained_tokens: int,
) -> Job:
    """The job's end: its result files (the CSV first, the adapter second), its model, its certificate.

    Raises LeaseLost; then nothing of it holds.
    """
    job = _write(
        session,
        claim,
        status="succeeded",
        finished_at=db_now(),
        fine_tuned_model=model,
        certificate=certificate,
        trained_tokens=trained_tokens,
        **_AT_REST,
    )
    job.result_files = [_record_result(session, job, file).id for file in files]
    session.add(Model(id=model, project_id=job.project_id, job_id=job.id))
    _end_attempt(session, job, "succeeded")
    _tell(
        session,
        job.id,
        Note("info", f"New fine-tuned model created: {model}"),
        Note("info", "The job has successfully completed"),
    )
    settle(session, job)
    return job


_AT_REST: dict[str, Any] = {
    "lease_owner": None,
    "lease_until": None,
    "requested": None,
    "estimated_finish": None,
}
"""What a job without an attempt does not have."""


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


def fail(session: Session, claim: Claim, error: OloraError | StoreError) -> Job:
    """The job cannot be done; its owner reads why. Raises LeaseLost."""
    job = _write(session, claim)
    _end_failed(session, job, error_dict(error))
    return job


def cancelled(session: Session, claim: Claim) -> Job:
    """The trainer has stopped as its owner wished. Raises LeaseLost."""
    job = _write(session, claim)
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
    """The attempt is over and the job is not: another attempt goes on from the last checkpoint.

    `message` is a sentence that says what happened. A crash counts; `max_failures` of them without a new
    checkpoint in between end the job. Raises LeaseLost.
    """
    job = _write(session, claim)
    _release(session, job, reason, message, crashed, max_failures)
    return job


def sweep(session: Session, settings: Settings) -> int:
    """Takes jobs from attempts whose lease has run out. Returns how many."""
    jobs = session.scalars(select(Job).where(lease_is_over()).with_for_update(skip_locked=True)).all()
    for job in jobs:
        message = f"The worker {job.lease_owner} was lost: it said nothing until its lease ran out."
        _release(session, job, "lease_lost", message, True, settings.max_failures)
    return len(jobs)


def _release(session: Session, job: Job, reason: str, message: str, crashed: bool, max_failures: int) -> None:
    if job.requested == "cancel":
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
    _rest(job)
    data = {"reason": reason, "attempt": job.attempt, "step": job.step}
    data["resumes_from_step"] = checkpoint.step if checkpoint else 0
    onward = f"Step {job.step} was reached; the job is queued again and goes on from {start}."
    _tell(session, job.id, Note("warn" if crashed else "info", f"{message} {onward}", data))
    settle(session, job)


def _gave_up(job: Job, reason: str, message: str, start: str) -> dict[str, Any]:
    times = "once" if job.failures == 1 else f"{job.failures} times"
    sentence = f"The job failed {times} without a new checkpoint in between (the last one is {start})."
    return {"code": reason, "message": f"{sentence} At last: {message}", "param": None}


def back_off(failures: int) -> float:
    """Seconds that a job rests after its n-th crash in a row: 1, 2, 4, … 60."""
    return min(MAX_BACK_OFF_SECONDS, 2.0 ** (failures - 1))


def cancel(session: Session, job: Job) -> Job:
    """Ends a job that waits, asks a running one to end; a cancelled one stays as it is.

    Raises JobStateError for a job that has ended otherwise.
    """
    current = session.scalar(
        select(Job).where(Job.id == job.id).with_for_update().execution_options(populate_existing=True)
    )
    assert current is not None
    if current.status in ("validating_files", "queued"):
        _end_cancelled(session, current)
    elif current.status == "running":
        if current.requested != "cancel":
            current.requested = "cancel"
            _tell(
                session, current.id, Note("info", "Cancellation was requested; the job ends at its next step")
            )
    elif current.status != "cancelled":
        raise JobStateError(f"Job {current.id} cannot be cancelled: it has {current.status} already.")
    session.flush()
    return current


def _end_cancelled(session: Session, job: Job) -> None:
    job.status, job.finished_at = "cancelled", db_now()
    _end_attempt(session, job, "cancelled")
    _rest(job)
    _tell(session, job.id, Note("info", "The job has been cancelled"))
    settle(session, job)


def _end_failed(session: Session, job: Job, error: dict[str, Any]) -> None:
    job.status, job.finished_at = "failed", db_now()
    job.error = error
    _end_attempt(session, job, str(error["code"]))
    _rest(job)
    _tell(session, job.id, Note("error", f"The job failed: {error['message']}"))
    settle(session, job)


def _rest(job: Job) -> None:
    for name, value in _AT_REST.items():
        setattr(job, name, value)


def error_dict(error: OloraError | StoreError) -> dict[str, Any]:
    return {"code": error.code, "message": storable(error.message), "param": error.param}


def _end_attempt(session: Session, job: Job, reason: str) -> None:
    session.execute(
        update(Attempt)
        .where(Attempt.job_id == job.id, Attempt.attempt == job.attempt, Attempt.ended_at.is_(None))
        .values(ended_at=db_now(), end_reason=reason[:64])
    )


# --- events --------------------------------------------------------------------------------------------


def _tell(session: Session, job_id: str, *notes: Notice) -> None:
    if notes:
        rows = [_event(job_id, note.level, "message", note.message, note.data) for note in notes]
        session.execute(insert(Event), rows)


def _event(job_id: str, level: str, type: str, message: str, data: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "id": new_id("ftevent-"),
        "job_id": job_id,
        "level": level,
        "type": type,
        "message": storable(message),
        "data": data,
    }


def storable(text: str) -> str:
    """A sentence may quote a training file, and that a character which PostgreSQL does not hold: NUL."""
    return text.replace("\x00", "\ufffd")


# --- reading -------------------------------------------------------------------------------------------


def get_job(session: Session, project_id: str, job_id: str) -> Job:
    """Raises NotFound, also for another project's job."""
    job = session.scalar(select(Job).where(Job.id == job_id, Job.project_id == project_id))
    if job is None:
        raise NotFound(f"No such fine-tuning job: {job_id}.", param="fine_tuning_job_id")
    return job


def list_jobs(
    session: Session,
    project_id: str,
    *,
    metadata: Mapping[str, str] | Literal["null"] | None = None,
    after: str | None = None,
    limit: int = 20,
) -> Page[Job]:
    """Newest first. `metadata` keeps the jobs with all these pairs, or with "null" those without any."""
    rows = select(Job)
    if metadata == "null":
        rows = rows.where(Job.job_metadata.is_(None))
    elif metadata:
        for key, value in metadata.items():
            rows = rows.where(_has_pair(session, key, value))
    return read_page(session, rows, Job, within=Job.project_id == project_id, after=after, limit=limit)


def _has_pair(session: Session, key: str, value: str) -> Any:
    each = func.json_each if session.get_bind().dialect.name == "sqlite" else func.json_each_text
    pairs = each(Job.job_metadata).table_valued("key", "value")
    return select(1).select_from(pairs).where(pairs.c.key == key, pairs.c.value == value).exists()


def list_events(session: Session, job_id: str, *, after: str | None = None, limit: int = 20) -> Page[Event]:
    """Newest first."""
    return read_page(session, select(Event), Event, within=Event.job_id == job_id, after=after, limit=limit)


def events_since(session: Session, job_id: str, seq: int = 0, limit: int = 1000) -> Sequence[Event]:
    """The events after a sequence number, oldest first."""
    rows = select(Event).where(Event.job_id == job_id, Event.seq > seq).order_by(Event.seq).limit(limit)
    return session.scalars(rows).all()


def list_checkpoints(
    session: Session, job_id: str, *, after: str | None = None, limit: int = 10
) -> Page[Checkpoint]:
    """Those that are still stored, newest first."""
    rows = select(Checkpoint).where(Checkpoint.storage_key.is_not(None))
    return read_page(session, rows, Checkpoint, within=Checkpoint.job_id == job_id, after=after, limit=limit)


def get_checkpoint(session: Session, job_id: str, checkpoint_id: str) -> Checkpoint:
    """Raises NotFound, also for one that was pruned."""
    rows = _stored(job_id).where(Checkpoint.id == checkpoint_id)
    checkpoint = session.scalar(rows)
    if checkpoint is None:
        raise NotFound(f"No such checkpoint: {checkpoint_id}.", param="checkpoint_id")
    return checkpoint


def latest_checkpoint(session: Session, job_id: str) -> Checkpoint | None:
    """The furthest one that is stored."""
    return session.scalar(_stored(job_id).limit(1))


def stored_checkpoints(session: Session, job_id: str) -> Sequence[Checkpoint]:
    """All that can be resumed from, the furthest first."""
    return session.scalars(_stored(job_id)).all()


def _stored(job_id: str) -> Select[Checkpoint]:
    rows = select(Checkpoint).where(Checkpoint.job_id == job_id, Checkpoint.storage_key.is_not(None))
    return rows.order_by(Checkpoint.step.desc(), Checkpoint.seq.desc())


def metrics_csv(session: Session, job_id: str) -> str:
    """The result file: one row per step; an empty cell where a step has no number."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_HEADER)
    columns = ("train_loss", "train_mean_token_accuracy", "valid_loss", "valid_mean_token_accuracy")
    for metric in session.scalars(select(Metric).where(Metric.job_id == job_id).order_by(Metric.step)):
        writer.writerow([metric.step, *(metric.values.get(name, "") for name in columns)])
    return text.getvalue()


def list_models(session: Session, project_id: str) -> Sequence[Model]:
    """The project's fine-tuned models, newest first."""
    rows = select(Model).where(Model.project_id == project_id, Model.deleted_at.is_(None))
    return session.scalars(rows.order_by(Model.seq.desc())).all()


def get_model(session: Session, project_id: str, model_id: str) -> Model:
    """Raises NotFound, also for another project's model and for a deleted one."""
    rows = select(Model).where(
        Model.id == model_id, Model.project_id == project_id, Model.deleted_at.is_(None)
    )
    model = session.scalar(rows)
    if model is None:
        raise NotFound(f"The model '{model_id}' does not exist.", param="model", code="model_not_found")
    return model


def delete_model(session: Session, project_id: str, model_id: str) -> Model:
    """The model and its adapter file go, the job keeps its record. Raises NotFound."""
    model = get_model(session, project_id, model_id)
    model.deleted_at = db_now()
    job = session.scalar(select(Job).where(Job.id == model.job_id))
    adapters = job.result_files[1:] if job else []
    session.execute(
        update(File).where(File.id.in_(adapters), File.deleted_at.is_(None)).values(deleted_at=db_now())
    )
    settle(session, model)
    return model
