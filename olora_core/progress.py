"""What a training run or a comparison yields while it runs, for the caller to record."""

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
    "splitting",
    "starting",
    "measuring",
    "training",
    "evaluating",
    "sampling",
    "exporting",
    "certifying",
]

Stage = Literal["search", "final"]
"""The stages of a comparison: finding each method's learning rate, and the runs that are reported."""


@dataclass(frozen=True)
class Phase:
    """Progress in a part of the run that is not a training step."""

    name: PhaseName
    done: int
    total: int


Level = Literal["info", "warn", "error"]


@dataclass(frozen=True)
class Note:
    """A message to the job's owner."""

    level: Level
    message: str
    data: dict[str, Any] | None = None


@dataclass(frozen=True)
class Resolved:
    """The spec with every "auto" resolved."""

    spec: TrainSpec
    why: list[str]
    total_steps: int
    examples: int
    trained_parameters: int
    targets: list[str]


@dataclass(frozen=True)
class Step:
    """A finished optimizer step. `loss` is in nats per trained token or pair, without any penalty."""

    step: int
    total_steps: int
    epoch: float
    """Passes over the data so far, including this step."""
    loss: float
    accuracy: float
    """Share of this step's trained tokens that were the model's likeliest, or of its pairs with a positive
    reward margin."""
    trained_tokens: int
    tokens: int
    """All tokens of the step, without padding."""
    learning_rate: float
    grad_norm: float
    """Before clipping."""
    seconds: float
    memory_bytes: int
    """Peak so far, of the device or on a CPU of this process."""
    valid_loss: float | None = None
    """Over the first rows of the validation file; only at some steps."""
    valid_accuracy: float | None = None
    reward_margin: float | None = None
    """For pairs: the mean reward of the better answers minus the worse answers' mean reward."""


@dataclass(frozen=True)
class Evaluated:
    """An evaluation of the whole validation file, after `step` optimizer steps."""

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
    """With early stopping: the step with the lowest validation loss, whose checkpoint must be kept."""
    epoch: int | None = None
    """The epoch that ends with this step, counted from 1."""


class Sample(TypedDict):
    """The answers to one row."""

    line: int
    """Line number in the file."""
    prompt: str
    """As the model reads it, special tokens included; the end of a long one."""
    reference: str
    """The answer in the file; of a pair, the better one."""
    base: str
    tuned: str


@dataclass(frozen=True)
class Samples:
    """Answers of the base and of the tuned model to a few rows."""

    rows: list[Sample]
    file: Literal["validation", "training"]
    held_out: bool = False
    """Whether the rows are the share of the training file that was held out for validation."""


@dataclass(frozen=True)
class Finished:
    """The export is written and certified."""

    folder: Path
    """Named `adapter`, or `model` for merged weights."""
    certificate: dict[str, Any]
    metrics: dict[str, Any]
    trained_tokens: int
    steps: int


@dataclass(frozen=True)
class ComparedStep:
    """One optimizer step of one run of a comparison. The totals are estimates: a search may add runs."""

    step: int
    """Counted over all runs so far; it never falls."""
    total_steps: int
    method: str
    """The compared method's label."""
    stage: Stage
    learning_rate: float
    """The run's peak rate."""
    seed: int
    run: int
    runs: int
    run_step: int
    run_steps: int
    loss: float


@dataclass(frozen=True)
class RunFinished:
    """One run of a comparison has ended."""

    run: int
    runs: int
    method: str
    stage: Stage
    learning_rate: float
    seed: int
    steps: int
    loss: float | None
    """In nats, over the search split or the validation file; None when the run failed."""
    seconds: float
    """Time spent in steps."""


@dataclass(frozen=True)
class Compared:
    """The comparison has ended. `folder` holds comparison.html and comparison.json, which is `report`."""

    folder: Path
    report: dict[str, Any]


Progress = Phase | Note | Resolved | Step | Evaluated | Saved | Samples | Finished
ComparisonProgress = Phase | Note | ComparedStep | RunFinished | Saved | Compared
ResultT = TypeVar("ResultT")
UpdateT = TypeVar("UpdateT")


def drive(
    run: Generator[UpdateT, str | None, None], stop_request: Callable[[], str | None]
) -> Generator[UpdateT, None, None]:
    """Yields the updates of a training run or a comparison; closing this generator closes the run.

    After each optimizer step, calls `stop_request` and sends the result to the run: after "save" the next
    update is a Saved.
    """
    with closing(run):
        answer = None
        while True:
            try:
                update = run.send(answer)
            except StopIteration:
                return
            yield update
            # Only a step takes an answer: other updates may come from plain iterators.
            answer = stop_request() if isinstance(update, Step | ComparedStep) else None


def result_of(work: Generator[Any, None, ResultT]) -> ResultT:
    """What a generator returns, for callers that ignore its progress."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: ResultT = end.value
            return result
