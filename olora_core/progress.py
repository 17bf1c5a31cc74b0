"""What a training run says while it runs, and a comparison of many. Whoever drives them records it."""

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar

from .specs import TrainSpec

PhaseName = Literal[
    "loading",
    "checking",
    "tokenising",
    "starting",
    "training",
    "evaluating",
    "sampling",
    "exporting",
    "certifying",
]

Stage = Literal["search", "final"]
"""Of a comparison: which rate is best, and how good the method is at it."""


@dataclass(frozen=True)
class Phase:
    """A sign of life from a part of the run that is no training step."""

    name: PhaseName
    done: int
    total: int


Level = Literal["info", "warn", "error"]


@dataclass(frozen=True)
class Note:
    """A sentence for the job's owner."""

    level: Level
    message: str
    data: dict[str, Any] | None = None


@dataclass(frozen=True)
class Resolved:
    """Every "auto" is a number now."""

    spec: TrainSpec
    why: list[str]
    total_steps: int
    examples: int
    trained_parameters: int
    targets: list[str]


@dataclass(frozen=True)
class Step:
    """One optimizer step, told after it. `loss` is nats per trained token or pair, without any penalty."""

    step: int
    total_steps: int
    epoch: float
    """Passes over the data so far, this step included."""
    loss: float
    accuracy: float
    """Share of this step's trained tokens that the model would have chosen itself, or of its pairs whose
    better answer has gained more on the base than the worse one."""
    trained_tokens: int
    tokens: int
    """Without padding."""
    learning_rate: float
    grad_norm: float
    """Before clipping."""
    seconds: float
    memory_bytes: int
    """Peak so far: of the device, or of this process on a CPU."""
    valid_loss: float | None = None
    """Over a small, fixed part of the validation file."""
    valid_accuracy: float | None = None
    reward_margin: float | None = None
    """Of pairs: mean of beta times that gain's lead."""


@dataclass(frozen=True)
class Evaluated:
    """The whole validation file, after `step` optimizer steps."""

    step: int
    loss: float
    accuracy: float


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint folder."""

    step: int
    folder: Path
    metrics: dict[str, float]
    best_step: int | None = None
    """With early stopping: the step whose checkpoint must be kept, for no validation loss was lower."""


class Sample(TypedDict):
    """One row's answers."""

    line: int
    """Of the file."""
    prompt: str
    """As the model reads it, special tokens included; the end of a long one."""
    reference: str
    """What the file answers; of a pair, the better answer."""
    base: str
    tuned: str


@dataclass(frozen=True)
class Samples:
    """What the base and the tuned model answer to a few rows."""

    rows: list[Sample]
    file: Literal["validation", "training"]


@dataclass(frozen=True)
class Finished:
    """What was trained is exported and certified."""

    folder: Path
    """Named `adapter`, or `model` where the whole one was asked for."""
    certificate: dict[str, Any]
    metrics: dict[str, Any]
    trained_tokens: int
    steps: int


@dataclass(frozen=True)
class ComparedStep:
    """One optimizer step of one run of a comparison. Totals are as planned now; a search may add runs."""

    step: int
    """Over all runs so far; it never falls."""
    total_steps: int
    method: str
    """The compared method's label."""
    stage: Stage
    learning_rate: float
    """The run's peak."""
    seed: int
    run: int
    runs: int
    run_step: int
    run_steps: int
    loss: float


@dataclass(frozen=True)
class RunFinished:
    """One run of a comparison is over."""

    run: int
    runs: int
    method: str
    stage: Stage
    learning_rate: float
    seed: int
    steps: int
    loss: float | None
    """Nats over the search split, or over the validation file; None when it was not finite."""
    seconds: float
    """Spent in steps."""


@dataclass(frozen=True)
class Compared:
    """The comparison is done: `folder` holds comparison.html and comparison.json, `report` is the latter."""

    folder: Path
    report: dict[str, Any]


Progress = Phase | Note | Resolved | Step | Evaluated | Saved | Samples | Finished
ComparisonProgress = Phase | Note | ComparedStep | RunFinished | Saved | Compared
ResultT = TypeVar("ResultT")
UpdateT = TypeVar("UpdateT")


def drive(
    run: Generator[UpdateT, str | None, None], stop_request: Callable[[], str | None]
) -> Generator[UpdateT, None, None]:
    """The updates of a training run or a comparison; closing this closes the run.

    After each optimizer step `stop_request` is asked, and its answer sent to the run: after "save" the next
    update is a Saved. Only a step takes an answer.
    """
    with closing(run):
        answer = None
        while True:
            try:
                update = run.send(answer)
            except StopIteration:
                return
            yield update
            answer = stop_request() if isinstance(update, Step | ComparedStep) else None


def result_of(work: Generator[Any, None, ResultT]) -> ResultT:
    """What a generator returns, for callers to whom its progress says nothing."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: ResultT = end.value
            return result
