"""One run of a comparison: what all runs share, how a run is trained, and its result."""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import torch

from ..bases.loading import Base
from ..data.batches import steps_per_epoch
from ..devices import SINGLE
from ..errors import SpecError, TrainingError
from ..layers.adapter import Adapter, Site
from ..progress import Evaluated, Note, Phase, Saved, Stage, Step
from ..specs import AdapterSpec, ComparisonSpec, Hyperparameters, TrainSpec
from ..training.checkpoint import Snapshot
from ..training.data import Data
from ..training.resume import Checkpoints, restore
from ..training.run import restored_afterwards, start
from ..training.step import forget_peak_memory, peak_memory
from ..training.train import steps

EVALUATIONS = 12
"""Evaluations on the validation file in a final run, besides the one before its first step."""


@dataclass(frozen=True)
class PlannedRun:
    """A run still to be made."""

    method: str
    """The compared method's label."""
    adapter: AdapterSpec
    sites: list[Site]
    default_rate: float
    """The method's default learning rate, which the run's learning rate multiplies."""
    stage: Stage
    learning_rate: float
    seed: int
    steps: int


@dataclass(frozen=True)
class RunResult:
    """The result of one run."""

    method: str
    """The compared method's label."""
    stage: Stage
    learning_rate: float
    seed: int
    steps: int = 0
    loss: float | None = None
    """Nats on the search split, or on the validation file in a final run; None if the run failed."""
    error: str | None = None
    """Why the run failed; None if it succeeded."""
    curve: Sequence[tuple[int, float, float]] = ()
    """(step, loss, accuracy) on the same rows as `loss`."""
    seconds: float = 0.0
    """Time spent in steps."""
    tokens: int = 0
    peak_memory_bytes: int = 0
    exported_rank: int | None = None
    """In final runs only: the exported adapter's rank; None if the method exports merged weights only."""

    def state(self) -> dict[str, Any]:
        """For a checkpoint, JSON-able; checkpoints call the error `why`."""
        values = asdict(self)
        values["why"] = values.pop("error")
        return values

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The inverse of `state`. Raises KeyError or TypeError if it does not fit."""
        values = dict(state)
        return cls(error=values.pop("why"), **values)


@dataclass
class Terms:
    """What all runs of a comparison share."""

    spec: ComparisonSpec
    base: Base
    data: Data
    """The whole training file and the validation file, for final runs."""
    search_data: Data
    """The training rows without those held out, and those held out, for the search."""
    hyperparameters: Hyperparameters
    total_steps: int
    """Optimizer steps of a final run."""

    @property
    def seeds(self) -> list[int]:
        """Of the final runs; the search uses the first."""
        return [self.spec.seed + i for i in range(self.spec.seeds)]

    def data_of(self, stage: Stage) -> Data:
        return self.search_data if stage == "search" else self.data

    def train_spec(self, planned: PlannedRun) -> TrainSpec:
        """With equal stage and seed, every method sees the same rows in the same order."""
        rows = len(self.data_of(planned.stage).training)
        hyperparameters = {
            "learning_rate": planned.learning_rate,
            "learning_rate_multiplier": planned.learning_rate / planned.default_rate,
            "n_epochs": -(-planned.steps // steps_per_epoch(rows, self.hyperparameters.batch_size)),
            "max_steps": planned.steps,
        }
        own = {
            "adapter": planned.adapter,
            "hyperparameters": self.hyperparameters.model_copy(update=hyperparameters),
            "seed": planned.seed,
        }
        return self.spec.training.model_copy(update=own)


def train_run(
    terms: Terms, planned: PlannedRun, checkpoints: Checkpoints, interrupted: Snapshot | None
) -> Generator[Phase | Note | Step | Evaluated | Saved | RunResult, str | None, None]:
    """Trains one run, from the snapshot `interrupted` if there is one; its result is the last update.

    Raises TrainingError only for failures that are not the method's own; see `failure`.
    """
    base, spec = terms.base, terms.train_spec(planned)
    result = RunResult(planned.method, planned.stage, planned.learning_rate, planned.seed)
    with restored_afterwards(base):
        try:
            run, _ = yield from start(spec, spec, base, terms.data_of(planned.stage), planned.sites, SINGLE)
        except SpecError as error:  # the rung has too few steps for this method
            yield replace(result, error=error.message)
            return
        run.quick_examples = None  # only full evaluations, the same for every method
        if interrupted is not None:
            restore(run, interrupted, "checkpoint")
        forget_peak_memory(base.device)
        due = evaluation_steps(run.total_steps, 1 if planned.stage == "search" else EVALUATIONS)
        try:
            yield from steps(run, checkpoints, lambda run: run.step in due)
        except TrainingError as error:
            result = replace(result, error=failure(error, run.step))
        else:
            curve = [(each.step, each.loss, each.accuracy) for each in run.evaluations]
            result = replace(result, loss=curve[-1][1], curve=curve)
        yield replace(
            result,
            steps=run.step,
            seconds=run.seconds,
            tokens=run.tokens,
            peak_memory_bytes=peak_memory(base.device),
            exported_rank=exported_rank(run.adapters) if planned.stage == "final" else None,
        )


def evaluation_steps(total_steps: int, count: int) -> frozenset[int]:
    """With `count` 1 the last step alone; otherwise step 0 and `count` steps evenly spread to the last."""
    if count == 1:
        return frozenset([total_steps])
    return frozenset(total_steps * i // count for i in range(count + 1))


def exported_rank(adapters: Mapping[str, Adapter]) -> int | None:
    """The largest rank among the layers' exact pairs; None if the method has no exact pair."""
    with torch.no_grad():
        pairs = [adapter.pair() for adapter in adapters.values()]
    return None if any(pair is None for pair in pairs) else max(1, *(pair.rank for pair in pairs))


def failure(error: TrainingError, step: int) -> str:
    """Why the method failed: it diverged or ran out of memory. Raises any other error again."""
    if error.code == "not_finite":
        return f"It diverged after step {step}."
    if error.code != "out_of_memory":
        raise error
    return error.message
