"""Several methods on the same data, each at its best learning rate, as a generator like `train`.

Everything that is decided follows from the outcomes of the runs so far. So a comparison that goes on reads
those from its checkpoint, decides as it did, and trains what is missing.
"""

import hashlib
import json
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..bases.loading import Base, check_quantization
from ..bases.sites import target_sites
from ..data.batches import steps_per_epoch
from ..devices import ALONE
from ..errors import CheckpointError, SpecError, TrainingError
from ..export.manifest import versions
from ..layers.adapter import Adapter, Site
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
from ..specs import AdapterSpec, ComparisonSpec, Hyperparameters, TrainSpec, learning_rate_for, resolve
from ..training import checkpoint
from ..training.checkpoint import Snapshot
from ..training.data import Data, read_data
from ..training.resume import Checkpoints, put, restore, snapshot
from ..training.run import Run, borrowed, check_dtype, check_sharding, facts, start, steps_of
from ..training.step import forget_peak_memory, peak_memory
from ..training.train import steps
from .budget import trainable_parameters, within_budget
from .page import page
from .report import Candidate, Facts, Outcome, Trial, report_of
from .search import Grid, Rung, grid_around, halving, held_out

__all__ = [
    "Compared",
    "ComparedStep",
    "ComparisonProgress",
    "Note",
    "Phase",
    "RunFinished",
    "Saved",
    "compare",
]

PAGE, REPORT = "comparison.html", "comparison.json"
EVALUATIONS = 12
"""Of the whole validation file in a final run, beside the one before its first step."""
Wishes = Generator[ComparisonProgress, str | None, None]


def compare(
    spec: ComparisonSpec,
    base: Base,
    training: Path,
    validation: Path,
    folder: Path,
    *,
    resume: Path | None = None,
    checkpoint_seconds: float = 60.0,
    cache: Path | None = None,
) -> Wishes:
    """Finds each method's learning rate on rows held out of `training`, then trains it with several seeds.

    The last thing said is Compared: `folder` then holds `comparison.html` and `comparison.json`. `base` is
    loaded in `compute_dtype(spec.training, …)`, as for `train`, and is as it was when the loop is left.
    Sending "save" at a ComparedStep makes a Saved the next thing said. With `resume`, such a folder, the
    comparison goes on exactly there. Tokenised files are kept in `cache`, else in `folder`.

    Raises OloraErrors for expected trouble. A method that diverges or does not fit is told of in the report.
    """
    check_dtype(spec.training, base)
    check_quantization(spec.training, base)
    check_sharding(spec.training, base, ALONE)
    data = yield from read_data(spec.training, base, training, validation, cache or folder / "tokens")
    comparison = Comparison(spec, base, data, folder, checkpoint_seconds)
    if resume is not None:
        comparison.take_up(resume)
    else:
        yield from data.notes
        yield from comparison.rehearse()
    for entrant in comparison.entrants:
        yield from comparison.find_rate(entrant)
        yield from comparison.measure(entrant)
    report = comparison.report(training.name, validation.name)
    write(report, folder)
    yield Compared(folder, report)


def write(report: Mapping[str, Any], folder: Path) -> None:
    """The page and the numbers; the latter last."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PAGE).write_text(page(report), encoding="utf-8")
    numbers = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / REPORT).write_text(numbers + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Entrant:
    """One of the methods, as it is trained."""

    label: str
    adapter: AdapterSpec
    sites: list[Site]
    trainable_parameters: int
    own_rate: float
    grid: Grid


@dataclass(frozen=True)
class Task:
    """A run that is to be made."""

    entrant: Entrant
    stage: Stage
    learning_rate: float
    seed: int
    steps: int


class Comparison:
    """A comparison between two of its runs."""

    def __init__(
        self, spec: ComparisonSpec, base: Base, data: Data, folder: Path, checkpoint_seconds: float
    ) -> None:
        self.spec, self.base, self.data, self.folder = spec, base, data, folder
        kept, judging = held_out(len(data.training), spec.search_share, spec.seed)
        self.search_data = Data(data.training.taken(kept), data.training.taken(judging), {}, [])
        own = self.own_rate(spec.training.adapter)
        asked = spec.training.model_copy(
            update={"hyperparameters": spec.hyperparameters.model_copy(update={"learning_rate": own})}
        )
        resolved, self.why = resolve(asked, facts(base, data, ALONE))
        self.hyperparameters = resolved.hyperparameters
        self.total_steps = steps_of(self.hyperparameters, len(data.training))
        self.unfit: dict[str, str] = {}
        """Methods that cannot be trained here, and why."""
        self.failed: dict[str, str] = {}
        """Methods whose runs came to nothing, and why."""
        self.budget, self.entrants = self._enter()
        self.searched: dict[str, list[Trial]] = {}
        self.rates: dict[str, float] = {}
        """The best one of each method."""
        self.outcomes: list[Outcome] = []
        self.known: list[Outcome] = []
        """Of an earlier start, in the order in which the runs come."""
        self.at_hand: Snapshot | None = None
        """Of the run after those, in its midst."""
        self.ahead = {entrant.label: self._planned(entrant.grid) for entrant in self.entrants}
        """Steps of every run that each method is still to make, by the present plan."""
        self.checkpoints = Checkpoints(self.save, checkpoint_seconds, follow_evaluations=False)

    # --- what is compared ------------------------------------------------------------------------------

    def _enter(self) -> tuple[int, list[Entrant]]:
        """The budget, and the methods at the ranks that meet it; why others cannot is kept."""
        adapter = self.spec.training.adapter
        sites = target_sites(self.base.model, adapter.target_modules)
        own = trainable_parameters(adapter, sites, self.total_steps)
        budget = own if self.spec.budget == "auto" else self.spec.budget
        entrants = []
        for label, compared in zip(self.spec.labels, self.spec.methods, strict=True):
            adapter = compared.adapter
            try:
                sites = target_sites(self.base.model, adapter.target_modules)
                if compared.match_budget:
                    adapter = within_budget(adapter, budget, sites, self.total_steps)
            except SpecError as error:
                self.unfit[label] = error.message
                continue
            own_rate, numbers = self.own_rate(adapter), trainable_parameters(adapter, sites, self.total_steps)
            asked = self.spec.learning_rates
            grid = grid_around(own_rate) if asked == "auto" else Grid(asked)
            entrants.append(Entrant(label, adapter, sites, numbers, own_rate, grid))
        return budget, entrants

    def own_rate(self, adapter: AdapterSpec) -> float:
        return learning_rate_for(adapter, self.base.model.config.get_text_config().hidden_size)

    def _planned(self, grid: Grid) -> list[int]:
        """Steps of every run of a method, before any is made."""
        rung = next(halving(grid, self.total_steps), None)
        return self._finals() if rung is None else self._from(rung)

    def _from(self, rung: Rung) -> list[int]:
        """Steps of that rung's runs, and of all after them."""
        return [rung.steps] * len(rung.rates) + [*rung.ahead, *self._finals()]

    def _finals(self) -> list[int]:
        return [self.total_steps] * self.spec.seeds

    def rehearse(self) -> Iterator[Note | Phase]:
        """Starts every method once: what does not fit is known before the first run, and all methods then
        share the passes that the most demanding of them can make.
        """
        for sentence in (*self.why, *self.base.notes):
            yield Note("info", sentence)
        passes: list[Hyperparameters] = []
        for entrant in self.entrants:
            spec = self._spec(Task(entrant, "final", entrant.own_rate, self.spec.seed, self.total_steps))
            with borrowed(self.base):
                try:
                    run, plan = yield from start(spec, spec, self.base, self.data, entrant.sites, ALONE)
                except (SpecError, TrainingError) as error:
                    self.unfit[entrant.label] = error.message
                    continue
            for sentence in run.method.notes:
                yield Note("warn", f"{entrant.label}: {sentence}")
            passes.append(plan.spec.hyperparameters)
        for label, problem in self.unfit.items():
            yield Note("warn", f"{label} cannot be compared: {problem}")
        self._leave_out_the_unfit()
        if not passes:
            raise SpecError(f"None of the methods can be trained: {' '.join(self.unfit.values())}")
        shared = {
            "packing": passes[0].packing,
            "micro_batch_tokens": min(each.micro_batch_tokens for each in passes),
            "gradient_checkpointing": any(each.gradient_checkpointing for each in passes),
        }
        self.hyperparameters = self.hyperparameters.model_copy(update=shared)
        yield Note(
            "info",
            f"{len(self.entrants)} methods, {self._runs(0)} runs, {self._steps(0)} steps in all; the budget "
            f"is {self.budget:,} trainable parameters.",
        )

    def _leave_out_the_unfit(self) -> None:
        for label in self.unfit:
            self.ahead.pop(label, None)
        self.entrants = [entrant for entrant in self.entrants if entrant.label not in self.unfit]

    def _runs(self, done: int) -> int:
        """In all, by the present plan."""
        return done + sum(map(len, self.ahead.values()))

    def _steps(self, done: int) -> int:
        return done + sum(map(sum, self.ahead.values()))

    # --- one method ------------------------------------------------------------------------------------

    def find_rate(self, entrant: Entrant) -> Wishes:
        """Successive halving over the method's grid; see `search`."""
        trials = self.searched[entrant.label] = []
        rungs = halving(entrant.grid, self.total_steps)
        losses: list[float | None] | None = None
        while True:
            try:
                rung = rungs.send(losses) if losses else next(rungs)
            except StopIteration as end:
                best: float | None = end.value
                break
            self.ahead[entrant.label] = self._from(rung)
            if rung.extends and not self.known:
                yield Note(
                    "info",
                    f"{entrant.label}: the best rate so far is at the edge of what was tried, so "
                    f"{rung.rates[0]:g} is tried as well.",
                )
            losses = []
            for rate in rung.rates:
                task = Task(entrant, "search", rate, self.spec.seed, rung.steps)
                outcome = yield from self._outcome(task)
                trials.append(Trial(rate, rung.steps, outcome.loss))
                losses.append(outcome.loss)
        if best is None:
            yield from self._out(entrant, f"No learning rate gave a finite loss. {self.outcomes[-1].why}")
        else:
            self.rates[entrant.label] = best
            self.ahead[entrant.label] = self._finals()

    def measure(self, entrant: Entrant) -> Wishes:
        """The method at its best rate, once with every seed."""
        if entrant.label not in self.rates:
            return
        for seed in self.seeds:
            task = Task(entrant, "final", self.rates[entrant.label], seed, self.total_steps)
            outcome = yield from self._outcome(task)
            if outcome.loss is None:
                yield from self._out(entrant, f"It came to nothing with seed {seed}. {outcome.why}")
                return

    def _out(self, entrant: Entrant, problem: str) -> Iterator[Note]:
        self.failed[entrant.label] = problem
        self.ahead[entrant.label] = []
        if not self.known:
            yield Note("warn", f"{entrant.label} is out: {problem}")

    @property
    def seeds(self) -> list[int]:
        return [self.spec.seed + i for i in range(self.spec.seeds)]

    # --- one run ---------------------------------------------------------------------------------------

    def _outcome(self, task: Task) -> Generator[ComparisonProgress, str | None, Outcome]:
        """What a run came to: known from an earlier start, or trained now."""
        self.ahead[task.entrant.label].pop(0)
        if self.known:
            self.outcomes.append(self.known.pop(0))
            return self.outcomes[-1]
        outcome = yield from self._train(task)
        self.outcomes.append(outcome)
        done = len(self.outcomes)
        yield RunFinished(
            run=done,
            runs=self._runs(done),
            method=outcome.method,
            stage=outcome.stage,
            learning_rate=outcome.learning_rate,
            seed=outcome.seed,
            steps=outcome.steps,
            loss=outcome.loss,
            seconds=outcome.seconds,
        )
        return outcome

    def _train(self, task: Task) -> Generator[ComparisonProgress, str | None, Outcome]:
        spec, label = self._spec(task), task.entrant.label
        outcome = Outcome(label, task.stage, task.learning_rate, task.seed)
        with borrowed(self.base):
            try:
                run, _ = yield from start(
                    spec, spec, self.base, self._data(task.stage), task.entrant.sites, ALONE
                )
            except SpecError as error:  # too few steps for this method
                return replace(outcome, why=error.message)
            run.small_validation = None  # every evaluation is of the whole
            if self.at_hand is not None:
                restore(run, self.at_hand, "checkpoint")
                self.at_hand = None
            forget_peak_memory(self.base.device)
            try:
                yield from self._told(run, task)
            except TrainingError as error:
                outcome = replace(outcome, why=why_not(error, run.step))
            else:
                curve = [(each.step, each.loss, each.accuracy) for each in run.evaluations]
                outcome = replace(outcome, loss=curve[-1][1], curve=curve)
            return replace(
                outcome,
                steps=run.step,
                seconds=run.seconds,
                tokens=run.tokens,
                peak_memory_bytes=peak_memory(self.base.device),
                exported_rank=exported_rank(run.adapters) if task.stage == "final" else None,
            )

    def _told(self, run: Run, task: Task) -> Wishes:
        """The run's progress as the comparison's."""
        done, number = sum(outcome.steps for outcome in self.outcomes), len(self.outcomes) + 1
        points = evaluation_steps(run.total_steps, 1 if task.stage == "search" else EVALUATIONS)
        work = steps(run, self.checkpoints, lambda run: run.step in points)
        wish: str | None = None
        with closing(drive(work, lambda: wish)) as updates:
            for news in updates:
                if isinstance(news, Step):
                    wish = yield ComparedStep(
                        step=done + news.step,
                        total_steps=self._steps(done + run.total_steps),
                        method=task.entrant.label,
                        stage=task.stage,
                        learning_rate=task.learning_rate,
                        seed=task.seed,
                        run=number,
                        runs=self._runs(number),
                        run_step=news.step,
                        run_steps=news.total_steps,
                        loss=news.loss,
                    )
                elif isinstance(news, Phase | Note | Saved):
                    yield news

    def _data(self, stage: Stage) -> Data:
        return self.search_data if stage == "search" else self.data

    def _spec(self, task: Task) -> TrainSpec:
        """Of one seed and stage, all methods see the same rows in the same order."""
        rows = len(self._data(task.stage).training)
        chosen = {
            "learning_rate": task.learning_rate,
            "learning_rate_multiplier": task.learning_rate / task.entrant.own_rate,
            "n_epochs": -(-task.steps // steps_per_epoch(rows, self.hyperparameters.batch_size)),
            "max_steps": task.steps,
        }
        of_run = {
            "adapter": task.entrant.adapter,
            "hyperparameters": self.hyperparameters.model_copy(update=chosen),
            "seed": task.seed,
        }
        return self.spec.training.model_copy(update=of_run)

    # --- to be stopped, and to go on -------------------------------------------------------------------

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint of this comparison belongs to."""
        return {
            "comparison": hashlib.sha256(self.spec.model_dump_json().encode()).hexdigest(),
            "training data": self.data.training.digest,
            "validation data": self.data.validation.digest,
            "base model": self.base.fingerprint,
            "dtype": str(self.base.dtype),
        }

    def save(self, run: Run) -> Saved:
        """The outcomes so far, and the run at hand."""
        taken = snapshot(run)
        state = {
            "hyperparameters": self.hyperparameters.model_dump(mode="json"),
            "unfit": self.unfit,
            "outcomes": [asdict(outcome) for outcome in self.outcomes],
            "run": taken.state,
        }
        step = sum(outcome.steps for outcome in self.outcomes) + run.step
        saved = put(self.folder, step, Snapshot(self.identity, state, taken.tensors))
        run.saved_at = run.step
        metrics = {"step": step, "run": len(self.outcomes) + 1, "train_loss": run.history[-1][1]}
        return Saved(step, saved, metrics)

    def take_up(self, folder: Path) -> None:
        """Goes on where a checkpoint set the comparison down. Raises CheckpointError."""
        saved = checkpoint.load(folder, self.identity)
        try:
            self.hyperparameters = Hyperparameters.model_validate(saved.state["hyperparameters"])
            self.unfit = saved.state["unfit"]
            self.known = [Outcome(**values) for values in saved.state["outcomes"]]
            self.at_hand = Snapshot({}, saved.state["run"], saved.tensors)
        except (KeyError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"Checkpoint '{folder.name}' does not fit this comparison: {error}. Start it anew."
            ) from None
        self._leave_out_the_unfit()

    # --- the end ---------------------------------------------------------------------------------------

    def report(self, training: str, validation: str) -> dict[str, Any]:
        """With the files' names."""
        data, searched = self.data, self.search_data
        facts = Facts(
            model=self.base.name,
            type=self.spec.type,
            base_sha256=self.base.fingerprint,
            device=str(self.base.device),
            dtype=str(self.base.dtype).removeprefix("torch."),
            hyperparameters=self.hyperparameters.model_dump(
                mode="json",
                exclude_defaults=True,
                exclude={"learning_rate", "learning_rate_multiplier"},
            ),
            asked=self.spec.hyperparameters.model_dump(mode="json", exclude_defaults=True)
            | {
                "n_epochs": self.hyperparameters.n_epochs,
                "batch_size": self.hyperparameters.batch_size,
            },
            steps=self.total_steps,
            seeds=self.seeds,
            budget=self.budget,
            baseline=self.spec.labels[self.spec.baseline],
            training={
                "file": training,
                "sha256": data.hashes["training"],
                "examples": len(data.training),
            },
            validation={
                "file": validation,
                "sha256": data.hashes["validation"],
                "examples": len(data.validation),
            },
            search={
                "learning_rates": self.spec.model_dump(mode="json")["learning_rates"],
                "seed": self.spec.seed,
                "trained_on": len(searched.training),
                "examples": len(searched.validation),
            },
            versions=versions(),
        )
        return report_of(facts, [self._candidate(i) for i in range(len(self.spec.methods))])

    def _candidate(self, i: int) -> Candidate:
        label, adapter = self.spec.labels[i], self.spec.methods[i].adapter
        entrant = next((each for each in self.entrants if each.label == label), None)
        return Candidate(
            label=label,
            adapter=(entrant.adapter if entrant else adapter).model_dump(mode="json", exclude_defaults=True)
            | {"method": adapter.method, "rank": (entrant.adapter if entrant else adapter).rank},
            trainable_parameters=entrant.trainable_parameters if entrant else None,
            own_rate=entrant.own_rate if entrant else None,
            trials=self.searched.get(label, []),
            best_rate=self.rates.get(label),
            finals=[each for each in self.outcomes if each.method == label and each.stage == "final"],
            problem=self.unfit.get(label) or self.failed.get(label),
        )


def evaluation_steps(total_steps: int, count: int) -> frozenset[int]:
    """The last step, or that many steps evenly spread; with more than one, the start as well."""
    if count == 1:
        return frozenset([total_steps])
    return frozenset(total_steps * i // count for i in range(count + 1))


def exported_rank(adapters: Mapping[str, Adapter]) -> int | None:
    """Of the pair that these would be exported as; None where there is none."""
    with torch.no_grad():
        pairs = [adapter.pair() for adapter in adapters.values()]
    return None if any(pair is None for pair in pairs) else max(1, *(pair.rank for pair in pairs))


def why_not(error: TrainingError, step: int) -> str:
    """Raises what is not this method's own trouble again."""
    if error.code == "not_finite":
        return f"It diverged after step {step}."
    if error.code != "out_of_memory":
        raise error
    return error.message
