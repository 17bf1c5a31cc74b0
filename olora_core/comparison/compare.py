"""Several methods on the same data, each at its best learning rate, as a generator like `train`.

Every decision follows from the results of the runs so far. A checkpoint therefore holds those results and the
unfinished run: to resume is to make the same decisions again and to train what is missing.
"""

import hashlib
import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from datetime import date
from pathlib import Path
from typing import Any

from ..bases.loading import Base, check_quantization
from ..devices import SINGLE
from ..errors import CheckpointError, SpecError, TrainingError
from ..progress import (
    Compared,
    ComparedStep,
    ComparisonProgress,
    Note,
    Phase,
    RunFinished,
    Saved,
    Stage,
    Step,
    drive,
)
from ..specs import ComparisonSpec, Hyperparameters, check_judging, resolve
from ..training import checkpoint
from ..training.checkpoint import Snapshot
from ..training.data import Data, read_data
from ..training.resume import Checkpoints, snapshot, write_checkpoint
from ..training.run import Run, check_dtype, check_sharding, restored_afterwards, run_facts, start, steps_of
from .entrants import Entrant, Trial, default_rate, enter, plan_from, untrainable
from .page import page
from .report import report_of, setup_of
from .runs import PlannedRun, RunResult, Terms, train_run
from .search import FACTORS, halving, held_out

PAGE, REPORT = "comparison.html", "comparison.json"
Progress = Generator[ComparisonProgress, str | None, None]


def compare(
    spec: ComparisonSpec,
    base: Base,
    training: Path,
    validation: Path | None,
    folder: Path,
    *,
    resume: Path | None = None,
    checkpoint_seconds: float = 60.0,
    cache: Path | None = None,
    day: date | None = None,
) -> Progress:
    """Finds each method's learning rate on rows held out of `training`, then trains it with several seeds.

    Ends with Compared: `folder` then holds `comparison.html` and `comparison.json`. `base` is loaded in
    `compute_dtype(spec.training, …)`, as for `train`, and restored when the generator ends. Sending "save" at
    a ComparedStep makes Saved the next update. With `resume`, the folder of a Saved, the comparison continues
    exactly there. Tokenised files are kept in `cache`, or else in `folder`. `validation` is None with the
    spec's `validation_share`; `day` is as in `train`.

    Raises OloraErrors for expected failures. A method that diverges or cannot be trained here does not raise;
    the report says why it has no result.
    """
    check_dtype(spec.training, base)
    check_quantization(spec.training, base)
    check_sharding(spec.training, base, SINGLE)
    check_judging(spec, given=validation is not None)
    day = checkpoint.day_of(resume) or day
    data = yield from read_data(spec.training, base, training, validation, cache or folder / "tokens", day)
    comparison = Comparison(spec, base, data, folder, checkpoint_seconds)
    if resume is not None:
        comparison.resume(resume)
    else:
        yield from data.notes
        yield from comparison.try_out()
    for entrant in comparison.entrants:
        if entrant.can_train:
            yield from comparison.find_rate(entrant)
        if entrant.best_rate is not None:
            yield from comparison.measure(entrant)
    validation_name = None if validation is None else validation.name
    baseline = comparison.entrants[spec.baseline].label
    setup = setup_of(comparison.terms, comparison.budget, baseline, training.name, validation_name)
    report = report_of(setup, comparison.entrants)
    write(report, folder)
    yield Compared(folder, report)


def write(report: Mapping[str, Any], folder: Path) -> None:
    """Writes the page, then the JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PAGE).write_text(page(report), encoding="utf-8")
    numbers = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / REPORT).write_text(numbers + "\n", encoding="utf-8")


class Comparison:
    """The state of a comparison between two of its runs."""

    def __init__(
        self, spec: ComparisonSpec, base: Base, data: Data, folder: Path, checkpoint_seconds: float
    ) -> None:
        kept, judging = held_out(len(data.training), spec.search_share, spec.seed)
        search_data = Data(data.training.select(kept), data.training.select(judging), {}, [])
        rate = default_rate(spec.training.adapter, base)
        asked = spec.training.model_copy(
            update={"hyperparameters": spec.hyperparameters.model_copy(update={"learning_rate": rate})}
        )
        resolved, self.why = resolve(asked, run_facts(base, data, SINGLE))
        total_steps = steps_of(resolved.hyperparameters, len(data.training))
        self.terms = Terms(spec, base, data, search_data, resolved.hyperparameters, total_steps)
        self.budget, self.entrants = enter(spec, base, total_steps)
        self.folder = folder
        self.checkpoints = Checkpoints(self.save, checkpoint_seconds, follow_evaluations=False)
        self.results: list[RunResult] = []
        self.replayed: list[RunResult] = []
        """Results restored from a checkpoint, in the order of the runs, which are not trained again."""
        self.interrupted: Snapshot | None = None
        """Snapshot of the unfinished run, which comes after the replayed ones."""

    @property
    def spec(self) -> ComparisonSpec:
        return self.terms.spec

    def try_out(self) -> Iterator[Note | Phase]:
        """Starts every method once, so that one that cannot be trained here is known before the first run.

        All runs then share the micro-batch size and checkpointing of the method that needs most memory.
        """
        for sentence in (*self.why.values(), *self.terms.base.notes):
            yield Note("info", sentence)
        tried: list[Hyperparameters] = []
        for i, entrant in enumerate(self.entrants):
            if not entrant.can_train:
                continue
            planned = entrant.run("final", entrant.default_rate, self.spec.seed, self.terms.total_steps)
            spec = self.terms.train_spec(planned)
            with restored_afterwards(self.terms.base):
                try:
                    run, plan = yield from start(
                        spec, spec, self.terms.base, self.terms.data, entrant.sites, SINGLE
                    )
                except (SpecError, TrainingError) as error:
                    self.entrants[i] = untrainable(entrant.label, entrant.asked, error.message)
                    continue
            for sentence in run.method.notes:
                yield Note("warn", f"{entrant.label}: {sentence}")
            tried.append(plan.spec.hyperparameters)
        problems = {entrant.label: entrant.problem for entrant in self.entrants if entrant.problem}
        for label, problem in problems.items():
            yield Note("warn", f"{label} cannot be compared: {problem}")
        if not tried:
            raise SpecError(f"None of the methods can be trained: {' '.join(problems.values())}")
        shared = {
            "packing": tried[0].packing,
            "micro_batch_tokens": min(each.micro_batch_tokens for each in tried),
            "gradient_checkpointing": any(each.gradient_checkpointing for each in tried),
        }
        self.terms.hyperparameters = self.terms.hyperparameters.model_copy(update=shared)
        yield Note(
            "info",
            f"{len(tried)} methods, {self.planned_runs} runs, {self.planned_steps} steps in all; the budget "
            f"is {self.budget:,} trainable parameters.",
        )

    @property
    def planned_runs(self) -> int:
        """Runs still to be made, by the present plan."""
        return sum(len(entrant.planned_steps) for entrant in self.entrants)

    @property
    def planned_steps(self) -> int:
        """Steps of those runs."""
        return sum(sum(entrant.planned_steps) for entrant in self.entrants)

    # --- one method ------------------------------------------------------------------------------------

    def find_rate(self, entrant: Entrant) -> Progress:
        """Successive halving over the method's grid; see `search`."""
        rungs = halving(entrant.grid, self.terms.total_steps)
        finals = [self.terms.total_steps] * len(self.terms.seeds)
        losses: list[float | None] | None = None
        while True:
            try:
                rung = rungs.send(losses) if losses else next(rungs)
            except StopIteration as end:
                entrant.best_rate = end.value
                break
            entrant.planned_steps = plan_from(rung, finals)
            if rung.extends and not self.replayed:
                yield Note(
                    "info",
                    f"{entrant.label}: the best learning rate so far is at the edge of the grid, so "
                    f"{rung.rates[0]:g} is tried as well.",
                )
            losses = []
            for rate in rung.rates:
                result = yield from self._run(entrant, "search", rate, self.spec.seed, rung.steps)
                entrant.trials.append(Trial(rate, rung.steps, result.loss))
                losses.append(result.loss)
        if entrant.best_rate is None:
            yield from self._give_up(
                entrant, f"No learning rate gave a finite loss. {self.results[-1].error}"
            )
        else:
            entrant.planned_steps = finals

    def measure(self, entrant: Entrant) -> Progress:
        """Trains the method at its best learning rate, once with every seed."""
        rate = entrant.best_rate
        for seed in self.terms.seeds:
            result = yield from self._run(entrant, "final", rate, seed, self.terms.total_steps)
            entrant.finals.append(result)
            if result.loss is None:
                yield from self._give_up(entrant, f"The run with seed {seed} failed. {result.error}")
                return

    def _give_up(self, entrant: Entrant, problem: str) -> Iterator[Note]:
        entrant.problem, entrant.planned_steps = problem, []
        if not self.replayed:
            yield Note("warn", f"{entrant.label} is out: {problem}")

    # --- one run ---------------------------------------------------------------------------------------

    def _run(
        self, entrant: Entrant, stage: Stage, rate: float, seed: int, steps: int
    ) -> Generator[ComparisonProgress, str | None, RunResult]:
        """The result of a run: replayed from the checkpoint, or trained now."""
        entrant.planned_steps.pop(0)
        if self.replayed:
            self.results.append(self.replayed.pop(0))
            return self.results[-1]
        result = yield from self._train(entrant.run(stage, rate, seed, steps))
        self.results.append(result)
        done = len(self.results)
        yield RunFinished(
            run=done,
            runs=done + self.planned_runs,
            method=result.method,
            stage=result.stage,
            learning_rate=result.learning_rate,
            seed=result.seed,
            steps=result.steps,
            loss=result.loss,
            seconds=result.seconds,
        )
        return result

    def _train(self, planned: PlannedRun) -> Generator[ComparisonProgress, str | None, RunResult]:
        """Trains a run; its steps become steps of the comparison."""
        done = sum(result.steps for result in self.results)
        number = len(self.results) + 1
        interrupted, self.interrupted = self.interrupted, None
        stop_request: str | None = None
        run = train_run(self.terms, planned, self.checkpoints, interrupted)
        with closing(drive(run, lambda: stop_request)) as updates:
            for update in updates:
                if isinstance(update, Step):
                    stop_request = yield ComparedStep(
                        step=done + update.step,
                        total_steps=done + update.total_steps + self.planned_steps,
                        method=planned.method,
                        stage=planned.stage,
                        learning_rate=planned.learning_rate,
                        seed=planned.seed,
                        run=number,
                        runs=number + self.planned_runs,
                        run_step=update.step,
                        run_steps=update.total_steps,
                        loss=update.loss,
                    )
                elif isinstance(update, RunResult):
                    result = update  # the last update of every run
                elif isinstance(update, Phase | Note | Saved):
                    yield update
        return result

    # --- checkpoints -----------------------------------------------------------------------------------

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with to be resumed by this comparison."""
        terms = self.terms
        return {
            "comparison": hashlib.sha256(_without_new_defaults(terms.spec).encode()).hexdigest(),
            "training data": terms.data.training.digest,
            "validation data": terms.data.validation.digest,
            "base model": terms.base.fingerprint,
            "dtype": str(terms.base.dtype),
        }

    def save(self, run: Run) -> Saved:
        """Writes a checkpoint: the results so far, and a snapshot of the unfinished run."""
        unfinished = snapshot(run)
        state = {
            "hyperparameters": self.terms.hyperparameters.model_dump(mode="json"),
            "unfit": {
                label: each.problem
                for label, each in zip(self.spec.labels, self.entrants, strict=True)
                if not each.can_train
            },
            "outcomes": [result.state() for result in self.results],
            "default_rates": {
                label: each.default_rate
                for label, each in zip(self.spec.labels, self.entrants, strict=True)
                if each.can_train
            },
            "run": unfinished.state,
            "day": unfinished.state["day"],
        }
        step = sum(result.steps for result in self.results) + run.step
        saved = write_checkpoint(self.folder, step, Snapshot(self.identity, state, unfinished.tensors))
        run.saved_at = run.step
        metrics = {"step": step, "run": len(self.results) + 1, "train_loss": run.history[-1][1]}
        return Saved(step, saved, metrics)

    def _places(self) -> dict[str, int]:
        """The entrants' positions by label, and by method for labels of versions with other defaults."""
        methods = [method.adapter.method for method in self.spec.methods]
        return {name: i for names in (methods, self.spec.labels) for i, name in enumerate(names)}

    def resume(self, folder: Path) -> None:
        """Restores the state that `save` wrote to `folder`. Raises CheckpointError if it does not fit."""
        saved = checkpoint.load(folder, self.identity)
        places = self._places()
        try:
            self.terms.hyperparameters = Hyperparameters.model_validate(saved.state["hyperparameters"])
            for label, problem in saved.state["unfit"].items():
                i = places[label]
                self.entrants[i] = untrainable(self.entrants[i].label, self.spec.methods[i], problem)
            self.replayed = [RunResult.from_state(values) for values in saved.state["outcomes"]]
            self.interrupted = Snapshot({}, saved.state["run"], saved.tensors)
            for label, rate in saved.state.get("default_rates", former_default_rates(self.replayed)).items():
                self.entrants[places[label]].take_default_rate(rate, self.spec)
        except (KeyError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"Checkpoint '{folder.name}' does not fit this comparison: {error}. Start it anew."
            ) from None


def former_default_rates(results: Sequence[RunResult]) -> dict[str, float]:
    """By label, the methods' default rates when these results were made; earlier versions did not keep them.

    An automatic search begins at the lowest rate of the grid around the default.
    """
    first: dict[str, float] = {}
    for result in results:
        first.setdefault(result.method, float(f"{result.learning_rate / FACTORS[0]:.2g}"))
    return first


ADDED = ("validation_share", "group_by", "columns")
ADDED_HYPERPARAMETERS = ("train_on_reasoning", "control_tokens")
"""Options that are younger than the checkpoints of some unfinished comparisons."""


def _without_new_defaults(spec: ComparisonSpec) -> str:
    """The spec as JSON, as a version without these options wrote it, unless they are used."""
    inner = spec.hyperparameters
    fields, inner_fields = ComparisonSpec.model_fields, Hyperparameters.model_fields
    unused: dict[str, Any] = {name: True for name in ADDED if getattr(spec, name) == fields[name].default}
    unused["hyperparameters"] = {
        name for name in ADDED_HYPERPARAMETERS if getattr(inner, name) == inner_fields[name].default
    }
    return spec.model_dump_json(exclude=unused)
