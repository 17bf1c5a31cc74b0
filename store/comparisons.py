"""What a comparison records beyond a job's life cycle: its current run, its ended runs and its findings.

Every write is fenced.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import insert, select
from sqlalchemy.orm import Session

from olora_core.progress import Note

from .claims import Claim, write_as
from .endings import ResultFile, complete
from .events import event_row
from .models import Event, Job
from .progress import finite
from .session import db_now

RUN = "run"
"""The type of the events that report the end of a run."""
RUN_FIELDS = ("run", "runs", "run_step", "run_steps", "method", "stage", "learning_rate", "seed", "loss")
"""The fields of the trainer's newest `ComparedStep` that describe its run; the row keeps them as `at_run`."""

FIGURES = (
    *("label", "method", "rank", "alpha", "scale", "trainable_parameters", "learning_rate", "final"),
    *("steps_to_baseline", "seconds", "tokens_per_second", "peak_memory_bytes", "exported_rank", "problem"),
)
"""The fields of each method's report that the row keeps; curves and searches are only in the file."""


class EndedRun(Note):
    """One training run that has ended; `data` has the fields of the trainer's `RunFinished`."""

    def __init__(self, data: dict[str, Any]) -> None:
        super().__init__("info", _run_sentence(data), data)


def _run_sentence(run: Mapping[str, Any]) -> str:
    """`Run 7/45: olora, search, learning rate 0.003, seed 0: loss=1.2345 after 50 steps, 12 s`"""
    outcome = "it diverged" if run["loss"] is None else f"loss={run['loss']:.4f}"
    return (
        f"Run {run['run']}/{run['runs']}: {run['method']}, {run['stage']}, "
        f"learning rate {run['learning_rate']:g}, seed {run['seed']}: "
        f"{outcome} after {run['steps']} steps, {run['seconds']:.3g} s"
    )


def record(
    session: Session,
    claim: Claim,
    *,
    at: Mapping[str, Any] | None = None,
    events: Sequence[Note] = (),
    stage: Mapping[str, Any] | None = None,
    seconds_left: float | None = None,
) -> None:
    """Records progress: the newest step, which gets neither a row nor an event of its own, and events.

    The end of a run is reported once, whichever attempt reported it. Raises LeaseLost.
    """
    job = write_as(session, claim)
    if job.status == "cancelled":
        return
    if stage is not None:
        job.stage = dict(stage)
    if at is not None:
        job.step = max(job.step, int(at["step"]))
        job.total_steps = at["total_steps"]
        job.at_run, _ = finite({name: at[name] for name in RUN_FIELDS})
    if seconds_left is not None and job.status == "running":
        job.estimated_finish = db_now() + seconds_left
    _add_events(session, job, events)
    session.flush()


def _add_events(session: Session, job: Job, events: Sequence[Note]) -> None:
    reported = (
        _reported_runs(session, job.id) if any(isinstance(event, EndedRun) for event in events) else set()
    )
    rows = []
    for event in events:
        ends_run = isinstance(event, EndedRun)
        if not (ends_run and event.data and event.data["run"] in reported):
            type = RUN if ends_run else "message"
            rows.append(event_row(job.id, event.level, type, event.message, event.data))
    if rows:
        session.execute(insert(Event), rows)


def _reported_runs(session: Session, job_id: str) -> set[int]:
    rows = select(Event.data).where(Event.job_id == job_id, Event.type == RUN)
    return {data["run"] for data in session.scalars(rows) if data is not None}


def findings_of(report: Mapping[str, Any]) -> dict[str, Any]:
    """A summary of the core's report: verdict, the spec that trains the best method, main figures."""
    methods = [{name: method[name] for name in FIGURES} for method in report["methods"]]
    return {"verdict": report["verdict"], "winner": report["winner"], "methods": methods}


def succeed(session: Session, claim: Claim, *, files: Sequence[ResultFile], findings: dict[str, Any]) -> Job:
    """Ends the comparison with its page, its report and a summary of its findings. Raises LeaseLost."""
    return complete(session, claim, files, Note("info", findings["verdict"]["sentence"]), findings=findings)
