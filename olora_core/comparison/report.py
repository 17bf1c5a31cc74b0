"""What a comparison has found, as the JSON that its page and its reader share."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..progress import Stage
from .verdict import Difference, Verdict, difference, judge, steps_to

FORMAT = 2
RENAMED = {
    "trained_numbers": "trainable_parameters",
    "yardstick": "baseline",
    "steps_to_yardstick": "steps_to_baseline",
    "below_yardstick": "below_baseline",
}
"""Keys of format 1, and their names since format 2."""
UNITS = {"supervised": "nats a token", "dpo": "nats a pair"}


@dataclass(frozen=True)
class Outcome:
    """What one run came to."""

    method: str
    """The compared method's label."""
    stage: Stage
    learning_rate: float
    seed: int
    steps: int = 0
    loss: float | None = None
    """Nats over the search split, or over the validation file; None when the run failed."""
    why: str | None = None
    """It did."""
    curve: Sequence[tuple[int, float, float]] = ()
    """(step, loss, accuracy) over the same rows."""
    seconds: float = 0.0
    """Spent in steps."""
    tokens: int = 0
    peak_memory_bytes: int = 0
    exported_rank: int | None = None
    """Of the final runs; None where the method exports merged weights only."""


@dataclass(frozen=True)
class Trial:
    """One learning rate in one rung of a search."""

    learning_rate: float
    steps: int
    loss: float | None


@dataclass(frozen=True)
class Candidate:
    """A compared method, and what its runs came to."""

    label: str
    adapter: Mapping[str, Any]
    """Its options, rank included."""
    trainable_parameters: int | None
    own_rate: float | None
    trials: Sequence[Trial]
    best_rate: float | None
    finals: Sequence[Outcome]
    problem: str | None
    """Why it has no result."""


@dataclass(frozen=True)
class Facts:
    """What all of them had in common."""

    model: str
    type: str
    base_sha256: str
    device: str
    dtype: str
    hyperparameters: Mapping[str, Any]
    """As all runs have them, their learning rate aside."""
    asked: Mapping[str, Any]
    """Of these, what a spec must say to get them again."""
    steps: int
    seeds: Sequence[int]
    budget: int
    baseline: str
    """Label of plain LoRA."""
    training: Mapping[str, Any]
    """`file`, `sha256`, `examples`."""
    validation: Mapping[str, Any]
    search: Mapping[str, Any]
    """`examples` to judge by, `trained_on`, `seed`, `learning_rates` (a list or "auto")."""
    versions: Mapping[str, str] = field(default_factory=dict)


def read_report(stored: Mapping[str, Any]) -> dict[str, Any]:
    """A stored report in the present format, whichever version made it."""
    if stored["format"] != 1:
        return dict(stored)
    return {**_renamed(stored), "format": FORMAT}


def _renamed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {RENAMED.get(name, name): _renamed(item) for name, item in value.items()}
    return [_renamed(item) for item in value] if isinstance(value, list) else value


def report_of(facts: Facts, candidates: Sequence[Candidate]) -> dict[str, Any]:
    """JSON-able. Methods stand in the order in which they were asked for."""
    losses = {
        c.label: [run.loss for run in c.finals if run.loss is not None] for c in candidates if not c.problem
    }
    baseline = next((c for c in candidates if c.label == facts.baseline and not c.problem), None)
    target = statistics.fmean(losses[facts.baseline]) if baseline else None
    verdict = judge(losses, facts.baseline, UNITS[facts.type]) if losses else None
    methods = [_method(candidate, losses.get(facts.baseline), target) for candidate in candidates]
    return {
        "format": FORMAT,
        "verdict": _verdict(verdict, facts),
        "winner": _winner(verdict, facts, candidates),
        **{name: value for name, value in asdict(facts).items() if name != "asked"},
        "unit": UNITS[facts.type],
        "methods": methods,
    }


def _method(
    candidate: Candidate, baseline_losses: Sequence[float] | None, target: float | None
) -> dict[str, Any]:
    described = {
        "label": candidate.label,
        "method": candidate.adapter["method"],
        "adapter": dict(candidate.adapter),
        "rank": candidate.adapter["rank"],
        "trainable_parameters": candidate.trainable_parameters,
        "own_learning_rate": candidate.own_rate,
        "learning_rate": candidate.best_rate,
        "search": _search(candidate),
        "problem": candidate.problem,
        "curve": None,
        "final": None,
        "steps_to_baseline": None,
        "seconds": None,
        "tokens_per_second": None,
        "peak_memory_bytes": None,
        "exported_rank": None,
    }
    if candidate.problem:
        return described
    finals = candidate.finals
    curve = curve_of(finals)
    losses = [run.loss for run in finals]
    means = list(zip(curve["steps"], curve["mean"], strict=True))
    ranks = [run.exported_rank for run in finals]
    return described | {
        "curve": curve,
        "final": {
            "losses": losses,
            "mean": statistics.fmean(losses),
            "deviation": statistics.stdev(losses) if len(losses) > 1 else None,
            "accuracy": statistics.fmean(run.curve[-1][2] for run in finals),
            "below_baseline": _difference(difference(losses, baseline_losses) if baseline_losses else None),
        },
        "steps_to_baseline": None if target is None else steps_to(means, target),
        "seconds": statistics.median(run.seconds for run in finals),
        "tokens_per_second": statistics.median(run.tokens / run.seconds for run in finals),
        "peak_memory_bytes": max(run.peak_memory_bytes for run in finals),
        "exported_rank": None if None in ranks else max(ranks),
    }


def curve_of(finals: Sequence[Outcome]) -> dict[str, Any]:
    """The validation loss over the steps: of every seed, and their mean, least and most."""
    by_seed = [[loss for _, loss, _ in run.curve] for run in finals]
    at_step = list(zip(*by_seed, strict=True))
    return {
        "steps": [step for step, _, _ in finals[0].curve],
        "mean": [statistics.fmean(values) for values in at_step],
        "min": [min(values) for values in at_step],
        "max": [max(values) for values in at_step],
        "by_seed": by_seed,
    }


def _search(candidate: Candidate) -> list[dict[str, Any]]:
    """The rungs in their order; `kept` says which rates went on to the next, or were taken."""
    rungs: list[dict[str, Any]] = []
    for trial in candidate.trials:
        tried = {t["learning_rate"] for t in rungs[-1]["trials"]} if rungs else set()
        if not rungs or rungs[-1]["steps"] != trial.steps or trial.learning_rate in tried:
            rungs.append({"steps": trial.steps, "trials": []})
        rungs[-1]["trials"].append({"learning_rate": trial.learning_rate, "loss": trial.loss})
    for rung, following in zip(rungs, [*rungs[1:], None], strict=False):
        on = {candidate.best_rate} if following is None else {t["learning_rate"] for t in following["trials"]}
        for trial in rung["trials"]:
            trial["kept"] = trial["learning_rate"] in on
    return rungs


def _difference(found: Difference | None) -> dict[str, Any] | None:
    if found is None:
        return None
    low, high = found.bounds or (None, None)
    return {"mean": found.mean, "low": low, "high": high, "beyond_spread": found.is_beyond}


def _verdict(verdict: Verdict | None, facts: Facts) -> dict[str, Any]:
    if verdict is None:
        sentence = "Take none: no method came to a result; what went wrong stands beside each."
        return {
            "sentence": sentence,
            "take": None,
            "best": None,
            "runner_up": None,
            "seeds": len(facts.seeds),
        }
    return {
        "sentence": verdict.sentence,
        "take": verdict.take,
        "best": verdict.best,
        "runner_up": verdict.runner_up,
        "seeds": len(facts.seeds),
        "below_baseline": _difference(verdict.against_baseline),
        "below_runner_up": _difference(verdict.against_runner_up),
    }


def _winner(verdict: Verdict | None, facts: Facts, candidates: Sequence[Candidate]) -> dict[str, Any] | None:
    """A spec for `olora train` that makes the adapter of the method to take."""
    if verdict is None:
        return None
    taken = next(c for c in candidates if c.label == verdict.take)
    return {
        "model": facts.model,
        "type": facts.type,
        "training_file": facts.training["file"],
        "validation_file": facts.validation["file"],
        "output": f"{taken.adapter['method']}-adapter",
        "adapter": dict(taken.adapter),
        "hyperparameters": {**facts.asked, "learning_rate": taken.best_rate},
        "seed": facts.seeds[0],
    }
