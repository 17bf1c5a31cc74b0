"""The limits at which a job is paused: seconds of training, a point in time, trained tokens."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from store.kinds import KINDS
from store.models import Attempt, Job, Metric


@dataclass(frozen=True)
class Reached:
    """A limit that was reached: its name in the job's options, and a sentence for the job's owner."""

    reason: str
    sentence: str


@dataclass
class Limits:
    """The limits of one job. What earlier attempts have used since the job was last resumed counts."""

    word: str = "job"
    max_seconds: float | None = None
    finish_by: float | None = None
    max_train_tokens: int | None = None
    seconds_used: float = 0.0
    tokens: dict[int, int] = field(default_factory=dict)
    """Trained tokens by step: a step that is repeated after a crash counts once."""
    started_at: float = field(default_factory=time.monotonic)

    def count(self, kind: str, values: Mapping[str, Any]) -> None:
        """Takes one of the trainer's progress items."""
        if kind == "Step" and self.max_train_tokens is not None:
            self.tokens[values["step"]] = values["trained_tokens"]

    def reached(self, clock: Callable[[], float] = time.time) -> Reached | None:
        tokens = sum(self.tokens.values())
        used = self.seconds_used + time.monotonic() - self.started_at
        if self.max_seconds is not None and used >= self.max_seconds:
            found = ("max_seconds", f"has used its max_seconds = {self.max_seconds:g}")
        elif self.finish_by is not None and clock() >= self.finish_by:
            when = datetime.fromtimestamp(self.finish_by, UTC).isoformat(timespec="seconds")
            found = ("finish_by", f"has not finished by {when}, its finish_by")
        elif self.max_train_tokens is not None and tokens >= self.max_train_tokens:
            limit = f"reached its max_train_tokens = {self.max_train_tokens}"
            found = ("max_train_tokens", f"has trained on {tokens} tokens and {limit}")
        else:
            return None
        reason, what = found
        again = "" if reason == "finish_by" else ", with the same limit again"
        return Reached(reason, f"The {self.word} {what}. It is paused; resume it to let it go on{again}.")


def read_limits(session: Session, job: Job) -> Limits:
    """The limits of a claimed job, and what its earlier attempts have used of them."""
    options = job.options
    spent = select(func.sum(Attempt.ended_at - Attempt.started_at)).where(
        Attempt.job_id == job.id, Attempt.attempt > job.limits_from_attempt, Attempt.attempt < job.attempt
    )
    trained = {}
    if options.get("max_train_tokens") is not None:
        rows = select(Metric).where(Metric.job_id == job.id, Metric.step > job.limits_from_step)
        trained = {row.step: row.values.get("trained_tokens") or 0 for row in session.scalars(rows)}
    return Limits(
        word=KINDS[job.kind].word,
        max_seconds=options.get("max_seconds"),
        finish_by=options.get("finish_by"),
        max_train_tokens=options.get("max_train_tokens"),
        seconds_used=session.scalar(spent) or 0.0,
        tokens=trained,
    )
