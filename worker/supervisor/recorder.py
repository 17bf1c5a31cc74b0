"""Writes what the trainer reports into the rows: buffered, about once a second, whatever the kind of work."""

import math
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal

from olora_core.progress import Level, Note, PhaseName
from olora_core.specs import TrainSpec
from store import comparisons, progress
from store.comparisons import EndedRun

from .fenced import FencedSessions

RECORD_SECONDS = 1.0

StageName = PhaseName | Literal["fetching", "publishing"]
"""The trainer's phases, and what the supervisor does before and after them."""
STAGES: dict[StageName, str] = {
    "fetching": "Fetching the base model and the files",
    "loading": "Loading the base model",
    "checking": "Checking the rows",
    "tokenising": "Tokenising the rows",
    "splitting": "Holding out rows",
    "starting": "Building the adapters",
    "measuring": "Measuring the learning rate",
    "training": "Training",
    "evaluating": "Evaluating the validation rows",
    "sampling": "Generating sample answers",
    "exporting": "Exporting the adapter",
    "certifying": "Verifying the exported adapter",
    "publishing": "Storing the results",
}
"""What the job's owner reads when an attempt reaches a stage for the first time."""


class Recorder(ABC):
    """Buffers the trainer's messages until they are written. Writing raises LeaseLost."""

    def __init__(self, fenced: FencedSessions) -> None:
        self.fenced = fenced
        self.stepped = False
        """Whether this attempt has trained at all."""
        self._stepped_at = 0.0
        self._events: list[Note] = []
        self._stage: dict[str, Any] | None = None
        self._told_stages: set[str] = set()
        self._flushed_at = time.monotonic()

    def record(self, kind: str, values: dict[str, Any]) -> None:
        """Takes one progress item: its class name in `olora_core.progress`, and its fields."""
        match kind:
            case "Note":
                self.note(**values)
            case "Phase":
                self.stage(**values)

    def stage(self, name: StageName, done: int = 0, total: int = 1) -> None:
        """What the attempt is doing, shown in the row. The first time, it is also an event."""
        self._stage = {"name": name, "done": done, "total": total}
        if name not in self._told_stages:
            self._told_stages.add(name)
            self.note("info", STAGES[name], {"stage": name})
            self._flushed_at = -math.inf

    def note(self, level: Level, message: str, data: dict[str, Any] | None = None) -> None:
        """An event of the job: `level` is "info", "warn" or "error"."""
        self._events.append(Note(level, message, data))

    def flush_if_due(self) -> None:
        if time.monotonic() > self._flushed_at + RECORD_SECONDS:
            self._flush(hold_newest=True)

    def flush(self) -> None:
        """Writes everything that is buffered."""
        self._flush(hold_newest=False)

    def _flush(self, *, hold_newest: bool) -> None:
        self._flushed_at = time.monotonic()
        events, self._events = self._events, []
        stage, self._stage = self._stage, None
        self._write(events, stage, hold_newest=hold_newest)

    @abstractmethod
    def _write(self, events: list[Note], stage: dict[str, Any] | None, *, hold_newest: bool) -> None:
        """Empties the buffer into the rows; with `hold_newest`, a step that may still change stays."""

    def _note_step(self, step: int, total_steps: int) -> None:
        self.stage("training", step, total_steps)
        if not self.stepped:
            self._flushed_at = -math.inf  # the first step is shown at once: the job visibly trains
        self.stepped, self._stepped_at = True, time.monotonic()


@dataclass
class _Buffer:
    """The arguments of the next `progress.record`, but for its events."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    resolved: TrainSpec | None = None
    total_steps: int | None = None
    samples: dict[str, Any] | None = None


class FineTuningRecorder(Recorder):
    """Every step is a row and an event."""

    def __init__(self, fenced: FencedSessions) -> None:
        super().__init__(fenced)
        self._buffer = _Buffer()

    def record(self, kind: str, values: dict[str, Any]) -> None:
        super().record(kind, values)
        match kind:
            case "Step":
                self._note_step(values["step"], values["total_steps"])
                self._buffer.steps.append(values)
            case "Evaluated" if values["step"] == 0:
                message = f"Before training: validation loss={values['loss']:.2f}"
                self.note("info", message, {"loss": values["loss"], "accuracy": values["accuracy"]})
            case "Evaluated":
                self._buffer.evaluations.append(values)
            case "Resolved":
                self._resolved(values)
            case "Samples":
                self._buffer.samples = values

    def _resolved(self, values: dict[str, Any]) -> None:
        self._buffer.resolved = TrainSpec.model_validate(values["spec"])
        self._buffer.total_steps = values["total_steps"]
        if not self.fenced.claim.resolved:  # an earlier attempt has said so already
            for reason in values["why"]:
                self.note("info", reason)

    def _write(self, events: list[Note], stage: dict[str, Any] | None, *, hold_newest: bool) -> None:
        buffer, self._buffer = self._buffer, _Buffer()
        if hold_newest and self._newest_may_change(buffer):
            self._buffer.steps.append(buffer.steps.pop())
        if not events and stage is None and buffer == _Buffer():
            return
        self.fenced.write(
            progress.record,
            steps=buffer.steps,
            evaluations=buffer.evaluations,
            events=events,
            resolved=buffer.resolved,
            total_steps=buffer.total_steps,
            samples=buffer.samples,
            stage=stage,
        )

    def _newest_may_change(self, buffer: _Buffer) -> bool:
        """Whether the newest step's evaluation is still to come: both belong into one event."""
        newest = buffer.steps[-1] if buffer.steps else None
        if newest is None or not self._is_evaluated(newest):
            return False
        return not any(evaluation["step"] == newest["step"] for evaluation in buffer.evaluations)

    def _is_evaluated(self, step: dict[str, Any]) -> bool:
        """Whether the whole validation data is evaluated after a step: the last of an epoch or of the run."""
        claim = self.fenced.claim
        assert isinstance(claim.spec, TrainSpec)
        if claim.validation_key is None and claim.spec.validation_share is None:
            return False
        every = claim.spec.hyperparameters.eval_steps
        by_steps = every is not None and step["step"] % every == 0
        ends_epoch = bool(step["epoch"].is_integer()) or step["step"] == step["total_steps"]
        return by_steps or ends_epoch


class ComparisonRecorder(Recorder):
    """Of the steps only the newest is kept, in the comparison's own row; every run that ended is an event."""

    def __init__(self, fenced: FencedSessions) -> None:
        super().__init__(fenced)
        self._newest: dict[str, Any] | None = None
        self._first: tuple[int, float] | None = None
        """This attempt's first step and its time, to estimate the end from."""

    def record(self, kind: str, values: dict[str, Any]) -> None:
        super().record(kind, values)
        match kind:
            case "ComparedStep":
                self._note_step(values["step"], values["total_steps"])
                self._first = self._first or (values["step"], self._stepped_at)
                self._newest = values
            case "RunFinished":
                self._events.append(EndedRun(values))

    def _write(self, events: list[Note], stage: dict[str, Any] | None, *, hold_newest: bool) -> None:
        newest, self._newest = self._newest, None
        if events or stage is not None or newest is not None:
            left = self._seconds_left(newest)
            self.fenced.write(comparisons.record, at=newest, events=events, stage=stage, seconds_left=left)

    def _seconds_left(self, newest: dict[str, Any] | None) -> float | None:
        """By this attempt's mean step; the time between runs counts as part of the steps."""
        if newest is None or self._first is None:
            return None
        first_step, first_at = self._first
        done = newest["step"] - first_step
        left = newest["total_steps"] - newest["step"]
        return left * (self._stepped_at - first_at) / done if done else None
