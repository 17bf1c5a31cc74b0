"""A comparison's report: the JSON that the page shows and that is stored with it."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..export.manifest import versions
from ..specs import AdapterSpec
from .entrants import Entrant
from .report_format import FORMAT
from .runs import RunResult, Terms
from .verdict import Difference, Verdict, difference, judge, steps_to

UNITS = {"supervised": "nats per token", "dpo": "nats per pair"}


@dataclass(frozen=True)
class Setup:
    """What all runs had in common, JSON-able."""

    model: str
    type: str
    base_sha256: str
    device: str
    dtype: str
    hyperparameters: Mapping[str, Any]
    """Of all runs, without the learning rate."""
    asked: Mapping[str, Any]
    """The hyperparameters that a spec must give for the same run."""
    steps: int
    seeds: Sequence[int]
    budget: int
    baseline: str
    """Label of plain LoRA."""
    training: Mapping[str, Any]
    """`file`, `sha256`, `examples`."""
    validation: Mapping[str, Any]
    """The same; if it is held out of the training file also `held_out`, see `HeldOut`."""
    search: Mapping[str, Any]
    """`examples` held out, `trained_on`, `seed`, `learning_rates` (a list or "auto")."""
    columns: Mapping[str, str] | None = None
    """The mapping of the files' columns."""
    versions: Mapping[str, str] = field(default_factory=dict)


def setup_of(terms: Terms, budget: int, baseline: str, training: str, validation: str | None) -> Setup:
    """`baseline` is plain LoRA's label, `training` and `validation` are the files' names.

    `validation` is None if the spec has a `validation_share`.
    """
    base, spec, data, search = terms.base, terms.spec, terms.data, terms.search_data
    shown = terms.hyperparameters.model_dump(
        mode="json", exclude_defaults=True, exclude={"learning_rate", "learning_rate_multiplier"}
    )
    asked = spec.hyperparameters.model_dump(mode="json", exclude_defaults=True)
    counted = {"n_epochs": terms.hyperparameters.n_epochs, "batch_size": terms.hyperparameters.batch_size}
    return Setup(
        model=base.name,
        type=spec.type,
        base_sha256=base.fingerprint,
        device=str(base.device),
        dtype=str(base.dtype).removeprefix("torch."),
        hyperparameters=shown,
        asked=asked | counted,
        steps=terms.total_steps,
        seeds=terms.seeds,
        budget=budget,
        baseline=baseline,
        training={
            "file": training,
            "sha256": data.hashes["training"],
            "examples": len(data.training),
        },
        validation={
            "file": validation or training,
            "sha256": data.hashes["validation" if validation else "training"],
            "examples": len(data.validation),
            **({"held_out": asdict(data.held_out)} if data.held_out else {}),
        },
        search={
            "learning_rates": spec.model_dump(mode="json")["learning_rates"],
            "seed": spec.seed,
            "trained_on": len(search.training),
            "examples": len(search.validation),
        },
        columns=spec.columns,
        versions=versions(),
    )


def report_of(setup: Setup, entrants: Sequence[Entrant]) -> dict[str, Any]:
    """The report, JSON-able. Methods are in the spec's order."""
    losses = {each.label: [run.loss for run in each.finals] for each in entrants if not each.problem}
    target = statistics.fmean(losses[setup.baseline]) if setup.baseline in losses else None
    verdict = judge(losses, setup.baseline, UNITS[setup.type]) if losses else None
    methods = [_method(entrant, losses.get(setup.baseline), target) for entrant in entrants]
    return {
        "format": FORMAT,
        "verdict": _verdict(verdict, setup),
        "winner": _winner(verdict, setup, entrants),
        **{name: value for name, value in asdict(setup).items() if name != "asked"},
        "unit": UNITS[setup.type],
        "methods": methods,
    }


def _method(
    entrant: Entrant, baseline_losses: Sequence[float] | None, target: float | None
) -> dict[str, Any]:
    described = {
        "label": entrant.label,
        "method": entrant.adapter.method,
        "adapter": entrant.options,
        **_scaling(entrant.adapter),
        "options": entrant.adapter.model_dump(mode="json"),
        "match_budget": entrant.asked.match_budget,
        "before_budget": {
            **_scaling(entrant.asked.adapter),
            "options": entrant.asked.adapter.model_dump(mode="json"),
        },
        "trainable_parameters": entrant.trainable_parameters,
        "own_learning_rate": entrant.default_rate,
        "learning_rate": entrant.best_rate,
        "search": _search(entrant),
        "problem": entrant.problem,
        "curve": None,
        "final": None,
        "steps_to_baseline": None,
        "seconds": None,
        "tokens_per_second": None,
        "peak_memory_bytes": None,
        "exported_rank": None,
    }
    if entrant.problem:
        return described
    finals = entrant.finals
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


def _scaling(adapter: AdapterSpec) -> dict[str, Any]:
    """`scale_range` is null where all layers and links have the same scale."""
    low, high = adapter.scale_range
    return {
        "rank": adapter.rank,
        "alpha": adapter.alpha,
        "scale": adapter.scale,
        "scale_range": None if low == high else [low, high],
    }


def curve_of(finals: Sequence[RunResult]) -> dict[str, Any]:
    """The validation loss over the steps: by seed, and the mean, minimum and maximum over seeds."""
    by_seed = [[loss for _, loss, _ in run.curve] for run in finals]
    at_step = list(zip(*by_seed, strict=True))
    return {
        "steps": [step for step, _, _ in finals[0].curve],
        "mean": [statistics.fmean(values) for values in at_step],
        "min": [min(values) for values in at_step],
        "max": [max(values) for values in at_step],
        "by_seed": by_seed,
    }


def _search(entrant: Entrant) -> list[dict[str, Any]]:
    """The rungs in order; `kept` marks the rates of the next rung or, in the last one, the chosen rate."""
    rungs: list[dict[str, Any]] = []
    for trial in entrant.trials:
        tried = {t["learning_rate"] for t in rungs[-1]["trials"]} if rungs else set()
        if not rungs or rungs[-1]["steps"] != trial.steps or trial.learning_rate in tried:
            rungs.append({"steps": trial.steps, "trials": []})
        rungs[-1]["trials"].append({"learning_rate": trial.learning_rate, "loss": trial.loss})
    for rung, following in zip(rungs, [*rungs[1:], None], strict=False):
        on = {entrant.best_rate} if following is None else {t["learning_rate"] for t in following["trials"]}
        for trial in rung["trials"]:
            trial["kept"] = trial["learning_rate"] in on
    return rungs


def _difference(found: Difference | None) -> dict[str, Any] | None:
    if found is None:
        return None
    low, high = found.bounds or (None, None)
    return {"mean": found.mean, "low": low, "high": high, "beyond_spread": found.is_beyond}


def _verdict(verdict: Verdict | None, setup: Setup) -> dict[str, Any]:
    if verdict is None:
        sentence = "No method produced a result; see each method's error."
        return {
            "sentence": sentence,
            "take": None,
            "best": None,
            "runner_up": None,
            "seeds": len(setup.seeds),
        }
    return {
        "sentence": verdict.sentence,
        "take": verdict.take,
        "best": verdict.best,
        "runner_up": verdict.runner_up,
        "seeds": len(setup.seeds),
        "below_baseline": _difference(verdict.against_baseline),
        "below_runner_up": _difference(verdict.against_runner_up),
    }


def _winner(verdict: Verdict | None, setup: Setup, entrants: Sequence[Entrant]) -> dict[str, Any] | None:
    """A spec for `olora train` that trains the method to take."""
    if verdict is None:
        return None
    chosen = next(each for each in entrants if each.label == verdict.take)
    validation: dict[str, Any] = {"validation_file": setup.validation["file"]}
    if held_out := setup.validation.get("held_out"):
        validation = {"validation_share": held_out["share"]}
        if held_out["group_by"] is not None:
            validation["group_by"] = held_out["group_by"]
    columns = {"columns": dict(setup.columns)} if setup.columns else {}
    return {
        "model": setup.model,
        "type": setup.type,
        "training_file": setup.training["file"],
        **validation,
        **columns,
        "output": f"{chosen.adapter.method}-adapter",
        "adapter": chosen.options,
        "hyperparameters": {**setup.asked, "learning_rate": chosen.best_rate},
        "seed": setup.seeds[0],
    }
