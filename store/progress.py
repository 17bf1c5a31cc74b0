"""What an attempt records while it trains: metrics, events, checkpoints. Every write is fenced."""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import Select, func, insert, select, update
from sqlalchemy.orm import Session

from olora_core.progress import Note
from olora_core.specs import TrainSpec

from .claims import Claim, write_as
from .events import add_notes, event_row, storable
from .models import Checkpoint, Event, Job, Metric, new_id
from .pages import RowPage, read_page
from .session import db_now

KEPT_CHECKPOINTS = 2
CSV_COLUMNS = {
    "train_loss": "train_loss",
    "train_accuracy": "train_mean_token_accuracy",
    "valid_loss": "valid_loss",
    "valid_mean_token_accuracy": "valid_mean_token_accuracy",
    "full_valid_loss": "full_valid_loss",
    "full_valid_mean_token_accuracy": "full_valid_mean_token_accuracy",
}
"""OpenAI's columns after `step`, then those for the whole validation file; each with its metric."""
METRIC_NAMES = {
    "loss": "train_loss",
    "accuracy": "train_mean_token_accuracy",
    "valid_accuracy": "valid_mean_token_accuracy",
    "full_valid_accuracy": "full_valid_mean_token_accuracy",
}
"""The trainer's names of a step's metrics, and the names that clients see."""
SHOWN = (
    "step",
    "total_steps",
    "train_loss",
    "train_mean_token_accuracy",
    "valid_loss",
    "valid_mean_token_accuracy",
    "full_valid_loss",
    "full_valid_mean_token_accuracy",
    "reward_margin",
    "tokens",
    "seconds",
)
"""The values in a metrics event: OpenAI's, DPO's reward margin, and those that show the speed."""


def record(
    session: Session,
    claim: Claim,
    *,
    steps: Sequence[Mapping[str, Any]] = (),
    evaluations: Sequence[Mapping[str, Any]] = (),
    events: Sequence[Note] = (),
    resolved: TrainSpec | None = None,
    total_steps: int | None = None,
    samples: Mapping[str, Any] | None = None,
    stage: Mapping[str, Any] | None = None,
    estimated_finish: float | None = None,
) -> None:
    """Records progress. A step is recorded once, whichever attempt recorded it; a cancelled job's never.

    `steps` have the fields of the trainer's `Step` (step, loss, accuracy, valid_loss, seconds, …),
    `evaluations` those of `Evaluated` (step, loss and accuracy over the whole validation file), `samples`
    those of `Samples` (file, rows), `stage` those of `Phase` (name, done, total). The spec that the first
    attempt resolved is kept. Raises LeaseLost.
    """
    job = write_as(session, claim)
    if job.status == "cancelled":
        return
    job.step = max([job.step, *(int(step["step"]) for step in steps)])
    if stage is not None:
        job.stage = dict(stage)
    if total_steps is not None:
        job.total_steps = total_steps
    if resolved is not None and job.resolved is None:
        job.resolved = resolved.model_dump(mode="json")
    if samples is not None:
        job.samples = {**samples, "rows": [_storable(row) for row in samples["rows"]]}
    new, warnings = _new_metrics(session, job, steps, evaluations)
    add_notes(session, job.id, *events, *warnings)
    _add_metric_events(session, job, new)
    if estimated_finish is not None:
        job.estimated_finish = estimated_finish
    elif steps and job.status == "running":
        _estimate(session, job)
    session.flush()


def _storable(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: storable(value) if isinstance(value, str) else value for name, value in row.items()}


def _new_metrics(
    session: Session,
    job: Job,
    steps: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Mapping[str, Any]],
) -> tuple[list[dict[str, Any]], list[Note]]:
    """Inserts the new metrics. Returns them by step, and a warning for each number that is not finite."""
    rows = {row.step: row for row in _metric_rows(session, job.id, [*steps, *evaluations])}
    new: dict[int, dict[str, Any]] = {}
    warnings: list[Note] = []
    for step in steps:
        number = int(step["step"])
        known = rows[number].values if number in rows else {}
        if "train_loss" not in known and number not in new:
            measured = named(step)
            clean, bad_names = finite(measured)
            warnings += _not_finite(number, measured, bad_names)
            new[number] = {**known, **clean}
    for evaluation in evaluations:
        number = int(evaluation["step"])
        measured = {
            "full_valid_loss": evaluation["loss"],
            "full_valid_mean_token_accuracy": evaluation["accuracy"],
        }
        clean, bad_names = finite(measured)
        warnings += _not_finite(number, measured, bad_names)
        if number in new:
            new[number].update(clean)
        elif number not in rows or "full_valid_loss" not in rows[number].values:
            known = rows[number].values if number in rows else {"step": number}
            new[number] = {**known, **clean}
    for number, values in new.items():
        if number in rows:
            rows[number].values = values
        else:
            session.add(Metric(job_id=job.id, step=number, values=values))
    return [new[number] for number in sorted(new)], warnings


def _metric_rows(session: Session, job_id: str, measured: Iterable[Mapping[str, Any]]) -> Sequence[Metric]:
    numbers = {int(values["step"]) for values in measured}
    if not numbers:
        return []
    return session.scalars(select(Metric).where(Metric.job_id == job_id, Metric.step.in_(numbers))).all()


def named(step: Mapping[str, Any]) -> dict[str, Any]:
    """The trainer's metrics under the names that clients see."""
    return {METRIC_NAMES.get(name, name): value for name, value in step.items() if value is not None}


def finite(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The values with NaN and Infinity, which JSON has no word for, as None; and the names of those."""
    bad = [name for name, value in values.items() if isinstance(value, float) and not math.isfinite(value)]
    return {**values, **dict.fromkeys(bad)}, bad


def _not_finite(step: int, values: Mapping[str, Any], names: Iterable[str]) -> list[Note]:
    return [Note("warn", f"Step {step}: {name} is not a finite number ({values[name]}).") for name in names]


def _add_metric_events(session: Session, job: Job, new: Sequence[dict[str, Any]]) -> None:
    rows = []
    for values in new:
        data = {name: values[name] for name in SHOWN if name in values}
        data.setdefault("total_steps", job.total_steps)
        rows.append(event_row(job.id, "info", "metrics", step_sentence(data), data))
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
    session: Session,
    claim: Claim,
    step: int,
    metrics: Mapping[str, Any],
    storage_key: str,
    best_step: int | None = None,
    *,
    epoch: int | None = None,
    model: str | None = None,
    kept_epochs: int = 0,
) -> list[str]:
    """Records a stored checkpoint. Returns the storage keys of pruned ones.

    Two are kept, `best_step`'s, and those at the end of the last `kept_epochs` epochs: with `epoch`, the one
    that has just ended, the checkpoint is a model by the name `model`. A cancelled job gets no new one.
    One beyond all earlier ones resets the count of failures. Raises LeaseLost.
    """
    job = write_as(session, claim)
    if job.status == "cancelled":
        return [storage_key]
    job.step = max(job.step, step)
    furthest = session.scalar(select(func.max(Checkpoint.step)).where(Checkpoint.job_id == job.id))
    if furthest is None or step > furthest:
        job.failures = 0
    clean, _ = finite(named({"step": step, **metrics}))
    is_model = epoch is not None and kept_epochs > 0
    if is_model:
        session.execute(update(Checkpoint).where(Checkpoint.model == model).values(model=None))
    checkpoint = Checkpoint(
        id=new_id("ftckpt_"),
        job_id=job.id,
        attempt=claim.attempt,
        step=step,
        metrics=clean,
        storage_key=storage_key,
        epoch=epoch,
        model=model if is_model else None,
    )
    session.add(checkpoint)
    session.flush()
    return _prune(session, job.id, best_step, kept_epochs)


def _prune(session: Session, job_id: str, best_step: int | None, kept_epochs: int) -> list[str]:
    pruned = []
    steps: set[int] = set()
    epochs: set[int] = set()
    for checkpoint in stored_checkpoints(session, job_id):
        is_kept_epoch = checkpoint.epoch is not None and len(epochs | {checkpoint.epoch}) <= kept_epochs
        is_surplus = len(steps) >= KEPT_CHECKPOINTS and checkpoint.step != best_step and not is_kept_epoch
        if checkpoint.step in steps or is_surplus:
            assert checkpoint.storage_key is not None
            pruned.append(checkpoint.storage_key)
            checkpoint.storage_key = checkpoint.model = None
        elif not is_kept_epoch:
            checkpoint.model = None
        else:
            epochs.add(checkpoint.epoch or 0)
        steps.add(checkpoint.step)
    session.flush()
    return pruned


def list_checkpoints(
    session: Session, job_id: str, *, after: str | None = None, limit: int = 10
) -> RowPage[Checkpoint]:
    """The checkpoints that are stored and not deleted, newest first."""
    rows = select(Checkpoint).where(Checkpoint.storage_key.is_not(None), Checkpoint.deleted_at.is_(None))
    return read_page(session, rows, Checkpoint, within=Checkpoint.job_id == job_id, after=after, limit=limit)


def latest_checkpoint(session: Session, job_id: str) -> Checkpoint | None:
    """The stored checkpoint with the highest step."""
    return session.scalar(_stored(job_id).limit(1))


def stored_checkpoints(session: Session, job_id: str) -> Sequence[Checkpoint]:
    """All stored checkpoints, the highest step first."""
    return session.scalars(_stored(job_id)).all()


def _stored(job_id: str) -> Select[Checkpoint]:
    rows = select(Checkpoint).where(Checkpoint.job_id == job_id, Checkpoint.storage_key.is_not(None))
    return rows.order_by(Checkpoint.step.desc(), Checkpoint.seq.desc())


def warn_once(session: Session, claim: Claim, message: str, *, about: str) -> None:
    """Adds a warning about an attempt, even after its end, unless the job has one that begins with `about`.

    Nothing is written once another attempt holds the job.
    """
    mine = select(Job.id).where(Job.id == claim.job_id, Job.attempt == claim.attempt).with_for_update()
    begins = Event.message.startswith(about, autoescape=True)
    warned = select(Event.id).where(Event.job_id == claim.job_id, Event.level == "warn", begins).limit(1)
    if session.scalar(mine) is not None and session.scalar(warned) is None:
        add_notes(session, claim.job_id, Note("warn", message))


def step_rows(session: Session, job_id: str, *, after: int = 0) -> Sequence[Metric]:
    """The recorded steps beyond `after`, in order, each once."""
    rows = select(Metric).where(Metric.job_id == job_id, Metric.step > after)
    return session.scalars(rows.order_by(Metric.step)).all()


def step_moments(session: Session, job_id: str) -> dict[int, float]:
    """When each step's first event was written, in unix seconds."""
    events = select(Event.data, Event.created_at).where(Event.job_id == job_id, Event.type == "metrics")
    moments: dict[int, float] = {}
    for data, moment in session.execute(events.order_by(Event.seq)):
        moments.setdefault(data["step"], moment)
    return moments


def metrics_csv(session: Session, job_id: str) -> str:
    """The result file: one row per step; an empty cell where a step has no number."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["step", *CSV_COLUMNS])
    for metric in step_rows(session, job_id):
        writer.writerow([metric.step, *(metric.values.get(name, "") for name in CSV_COLUMNS.values())])
    return text.getvalue()
