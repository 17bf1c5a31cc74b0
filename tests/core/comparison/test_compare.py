"""A comparison on a tiny base: the same terms for all, and nothing tuned on the rows that are reported."""

import copy
import hashlib
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from olora_core.bases.loading import Base, load_base
from olora_core.comparison.compare import compare
from olora_core.comparison.entrants import enter
from olora_core.comparison.runs import RunResult
from olora_core.comparison.search import held_out
from olora_core.errors import CheckpointError, SpecError
from olora_core.layers.adapter import AdaptedLinear
from olora_core.methods import METHODS
from olora_core.methods.pissa import PiSSA
from olora_core.progress import (
    Compared,
    ComparedStep,
    ComparisonProgress,
    Finished,
    Note,
    RunFinished,
    Saved,
    result_of,
)
from olora_core.specs import ComparisonSpec, read_comparison, read_spec
from olora_core.specs.methods.lora import LoRASpec
from olora_core.specs.methods.pissa import PiSSASpec
from olora_core.training import checkpoint
from olora_core.training.data import read_data
from olora_core.training.step import forget_peak_memory, peak_memory
from olora_core.training.train import train

from ..runs import chat_rows, one, preference_rows, write_rows

STEPS = 16
RATES = (3e-4, 3e-3, 3e-2)
TIMINGS = ("seconds", "tokens_per_second", "peak_memory_bytes")


def comparison(methods: Any = ("olora", "lora"), **options: Any) -> ComparisonSpec:
    """A spec whose every number is small."""
    hyperparameters = {
        "n_epochs": 2,
        "batch_size": 4,
        "max_steps": STEPS,
        "dtype": "float32",
        "packing": False,
    } | options.pop("hyperparameters", {})
    chosen = {"learning_rates": RATES, "seeds": 2, "seed": 5, "search_share": 0.2, "budget": 700} | options
    return read_comparison(model="tiny", methods=methods, hyperparameters=hyperparameters, **chosen)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    rows = chat_rows(60)
    return write_rows(tmp_path / "train.jsonl", rows[:45]), write_rows(tmp_path / "valid.jsonl", rows[45:])


def told(
    spec: ComparisonSpec, base: Base, files: tuple[Path, Path], folder: Path, **options: Any
) -> list[ComparisonProgress]:
    return list(compare(spec, base, *files, folder, **options))


def report_in(progress: Iterable[ComparisonProgress]) -> dict[str, Any]:
    report: dict[str, Any] = one(Compared, progress).report
    return report


def without_timings(report: dict[str, Any]) -> dict[str, Any]:
    report = copy.deepcopy(report)
    for method in report["methods"]:
        for name in TIMINGS:
            del method[name]
    return report


# --- the same terms ----------------------------------------------------------------------------------------


def test_all_methods_see_the_same_rows_in_the_same_order(
    llama: Base, files: tuple[Path, Path], tmp_path: Path
) -> None:
    """At a rate that moves nothing, the loss of each step is the base's over that step's rows."""
    spec = comparison(["olora", "lora", "pissa", "cola", "rm_lora"], learning_rates=[1e-12])
    losses: dict[tuple[int, str], list[float]] = {}
    for step in told(spec, llama, files, tmp_path):
        if isinstance(step, ComparedStep):
            losses.setdefault((step.seed, step.method), []).append(step.loss)
    for seed in (5, 6):
        for method in ("olora", "pissa", "cola", "rm_lora"):
            assert losses[seed, method] == pytest.approx(losses[seed, "lora"], abs=1e-6)
    assert losses[5, "lora"] != pytest.approx(losses[6, "lora"], abs=1e-3)
    assert {len(taken) for taken in losses.values()} == {STEPS}


def test_every_method_trains_as_many_numbers_as_the_budget_allows(
    llama: Base, files: tuple[Path, Path], tmp_path: Path
) -> None:
    spec = comparison(
        ["olora", {"method": "pissa", "rank": 2}], budget="auto", learning_rates=[1e-3], seeds=1
    )
    olora, pissa, lora = report_in(told(spec, llama, files, tmp_path))["methods"]
    assert lora["rank"] == olora["rank"] == 8
    assert pissa["rank"] == 2
    assert lora["trainable_parameters"] == 4 * pissa["trainable_parameters"]
    assert (lora["exported_rank"], olora["exported_rank"], pissa["exported_rank"]) == (8, 16, 4)


def test_the_report_tells_the_scale_of_each_method_and_what_the_budget_made_of_it(
    llama: Base, files: tuple[Path, Path], tmp_path: Path
) -> None:
    asked = [
        {"method": "pissa", "dropout": 0.1},
        {"method": "pissa", "rank": 8, "alpha": 4},
        {"method": "lora", "rslora": True},
        "prilora",
        "mora",
        "tt_lora",
    ]
    spec = comparison(asked, budget="auto", learning_rates=[1e-3], seeds=1)
    methods = report_in(told(spec, llama, files, tmp_path))["methods"]
    by_budget, given, rslora, prilora, mora, tt_lora, lora = methods
    assert [(m["rank"], m["alpha"], m["scale"]) for m in (by_budget, given, rslora, lora)] == [
        (8, 16, 16 / 8),
        (8, 4, 4 / 8),
        (8, 16, pytest.approx(16 / 8**0.5)),
        (8, 16, 16 / 8),
    ]
    assert mora["scale"] == mora["alpha"] == 1
    assert tt_lora["scale"] == tt_lora["alpha"] == 16
    assert prilora["scale_range"] == [pytest.approx(16 / 12), pytest.approx(16 / 4)]
    assert [m["scale_range"] for m in methods if m is not prilora] == [None] * 6
    before = by_budget["before_budget"]
    assert before["rank"] == PiSSASpec().rank != 8
    assert before["scale"] == pytest.approx(16 / before["rank"])
    assert before["options"] == by_budget["options"] | {"rank": before["rank"]}
    assert [m["match_budget"] for m in methods] == [True, False, True, True, True, True, True]
    assert given["before_budget"]["options"] == given["options"]


def test_the_options_of_a_method_in_full_are_those_of_its_runs(
    llama: Base, files: tuple[Path, Path], tmp_path: Path
) -> None:
    spec = comparison([{"method": "olora", "dropout": 0.1}], learning_rates=[1e-3], seeds=1)
    olora, lora = report_in(told(spec, llama, files, tmp_path))["methods"]
    for method in (olora, lora):
        again = read_spec(model="tiny", adapter=method["options"]).adapter
        assert again == read_spec(model="tiny", adapter=method["adapter"]).adapter
        assert set(method["options"]) == set(type(again).model_fields)
    assert (olora["options"]["dropout"], lora["options"]["dropout"]) == (0.1, 0)


def test_methods_of_one_name_are_told_apart_by_the_ranks_and_alphas_that_they_have(llama: Base) -> None:
    plain = {"method": "olora", "rank": 8, "alpha": 8}
    plus = {"method": "lora", "lora_plus_ratio": 16, "target_modules": ["q_proj", "v_proj"]}
    _, entrants = enter(comparison(["olora", plain, "pissa", plus, "lora"], budget="auto"), llama, STEPS)
    assert [entrant.label.replace(f"rank {entrant.adapter.rank}", "rank R") for entrant in entrants] == [
        "olora (rank R by budget, alpha 16)",
        "olora (rank R, alpha 8)",
        "pissa",
        "lora (target_modules [q_proj, v_proj], lora_plus_ratio 16)",
        "lora",
    ]
    assert (entrants[0].adapter.rank, entrants[0].adapter.alpha) == (8, 16)
    assert len({entrant.label for entrant in entrants}) == 5


def test_the_validation_file_has_no_part_in_the_search(
    llama: Base, files: tuple[Path, Path], tmp_path: Path
) -> None:
    training, validation = files
    other = write_rows(tmp_path / "other.jsonl", chat_rows(9))
    reports = [
        report_in(told(comparison(seeds=1), llama, (training, held_out), tmp_path / held_out.stem))
        for held_out in (validation, other)
    ]
    searches = [[method["search"] for method in report["methods"]] for report in reports]
    assert searches[0] == searches[1]
    finals = [report["methods"][0]["final"]["mean"] for report in reports]
    assert abs(finals[0] - finals[1]) > 1e-4


def test_the_search_trains_on_the_rows_that_it_does_not_judge_by(
    llama: Base, files: tuple[Path, Path], tmp_path: Path
) -> None:
    """A run on files with just these rows has the loss of the search's trial."""
    report = report_in(told(comparison(seeds=1), llama, files, tmp_path / "compared"))
    assert report["search"] == {"learning_rates": list(RATES), "seed": 5, "trained_on": 29, "examples": 16}
    train_on, judge_by = held_out(45, 0.2, seed=5)
    rows = chat_rows(45)
    split = (
        write_rows(tmp_path / "rest.jsonl", [rows[i] for i in train_on]),
        write_rows(tmp_path / "held.jsonl", [rows[i] for i in judge_by]),
    )
    lora = report["methods"][1]
    trial = lora["search"][1]["trials"][0]
    spec = report["winner"]["hyperparameters"] | {"learning_rate": trial["learning_rate"], "samples": 0}
    alone = read_spec(
        model="tiny", hyperparameters=spec, adapter={"method": "lora", "rank": lora["rank"]}, seed=5
    )
    finished = one(Finished, train(alone, llama, *split, tmp_path / "alone"))
    assert finished.metrics["valid_loss_after"] == pytest.approx(trial["loss"], abs=1e-6)


# --- the search and the finals -----------------------------------------------------------------------------


def test_the_rate_with_the_lowest_loss_in_full_is_trained_with_every_seed(
    llama: Base, files: tuple[Path, Path], tmp_path: Path
) -> None:
    progress = told(comparison(), llama, files, tmp_path)
    report = report_in(progress)
    runs = [p for p in progress if isinstance(p, RunFinished)]
    for method in report["methods"]:
        own = [run for run in runs if run.method == method["label"]]
        full = {r.learning_rate: r.loss for r in own if r.stage == "search" and r.steps == STEPS}
        assert method["learning_rate"] == min(full, key=full.__getitem__)
        finals = [run for run in own if run.stage == "final"]
        assert [run.seed for run in finals] == [5, 6]
        assert {run.learning_rate for run in finals} == {method["learning_rate"]}
        assert method["final"]["losses"] == [run.loss for run in finals]
        first, last = method["search"]
        assert (first["steps"], last["steps"]) == (8, STEPS)
        assert [trial["learning_rate"] for trial in first["trials"] if trial["kept"]] == sorted(full)


def test_the_winner_trained_by_itself_comes_to_the_reported_loss(
    llama: Base, files: tuple[Path, Path], tmp_path: Path
) -> None:
    report = report_in(told(comparison(), llama, files, tmp_path))
    winner = dict(report["winner"])
    assert (winner.pop("training_file"), winner.pop("validation_file")) == ("train.jsonl", "valid.jsonl")
    winner.pop("output")
    winner["hyperparameters"]["samples"] = 0
    finished = one(Finished, train(read_spec(**winner), llama, *files, tmp_path / "again"))
    taken = next(m for m in report["methods"] if m["label"] == report["verdict"]["take"])
    assert finished.metrics["valid_loss_after"] == pytest.approx(taken["final"]["losses"][0], abs=1e-6)
    assert finished.metrics["valid_accuracy_after"] >= 0


def test_curves_are_of_the_same_steps_for_all_and_begin_at_the_base(
    llama: Base, files: tuple[Path, Path], tmp_path: Path
) -> None:
    report = report_in(told(comparison(hyperparameters={"max_steps": 24}), llama, files, tmp_path))
    olora, lora = (method["curve"] for method in report["methods"])
    assert olora["steps"] == lora["steps"] == list(range(0, 25, 2))
    assert olora["mean"][0] == pytest.approx(lora["mean"][0], abs=1e-6)
    for curve in (olora, lora):
        for mean, low, high, *by_seed in zip(
            curve["mean"], curve["min"], curve["max"], *curve["by_seed"], strict=True
        ):
            assert (mean, low, high) == (
                pytest.approx(math.fsum(by_seed) / 2),
                min(by_seed),
                max(by_seed),
            )


def test_steps_count_over_all_runs_and_end_at_their_total(
    llama: Base, files: tuple[Path, Path], tmp_path: Path
) -> None:
    progress = told(comparison(learning_rates="auto"), llama, files, tmp_path)
    steps = [p for p in progress if isinstance(p, ComparedStep)]
    assert [step.step for step in steps] == list(range(1, len(steps) + 1))
    assert steps[-1].step == steps[-1].total_steps
    assert steps[-1].run == steps[-1].runs
    runs = [p for p in progress if isinstance(p, RunFinished)]
    assert [run.run for run in runs] == list(range(1, len(runs) + 1))
    extended = [p for p in progress if isinstance(p, Note) and "edge" in p.message]
    assert steps[-1].runs == steps[0].runs + len(extended)


@pytest.mark.slow
def test_all_methods_can_be_compared(llama: Base, files: tuple[Path, Path], tmp_path: Path) -> None:
    spec = comparison("all", learning_rates=[1e-3], seeds=1, budget="auto")
    report = report_in(told(spec, llama, files, tmp_path))
    assert [method["label"] for method in report["methods"]] == list(METHODS)
    for method in report["methods"]:
        assert method["problem"] is None
        assert method["final"]["mean"] > 0


def test_a_method_that_exports_no_adapter_says_so(
    llama: Base, files: tuple[Path, Path], tmp_path: Path
) -> None:
    merged = {"method": "mora", "type": 6, "export": "merged"}
    report = report_in(told(comparison([merged], learning_rates=[1e-3], seeds=1), llama, files, tmp_path))
    mora, _ = report["methods"]
    assert mora["exported_rank"] is None
    assert mora["final"]["mean"] > 0
    assert "merged only" in (tmp_path / "comparison.html").read_text()


def test_preferences_are_compared_too(llama: Base, tmp_path: Path) -> None:
    rows = preference_rows(30)
    files = write_rows(tmp_path / "train.jsonl", rows[:20]), write_rows(tmp_path / "valid.jsonl", rows[20:])
    report = report_in(told(comparison(type="dpo", seeds=1), llama, files, tmp_path))
    assert report["unit"] == "nats per pair"
    assert "nats per pair" in report["verdict"]["sentence"]


# --- what goes wrong ---------------------------------------------------------------------------------------


class Exploding(PiSSA):
    """Its factors are infinite after a few steps at all but the lowest rate."""

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        super().after_step(step, optimizer)
        (group,) = optimizer.param_groups
        if step == 3 and group["lr"] > self.limit:
            group["params"][0].data.fill_(math.inf)

    limit = 1e-3


class AlwaysExploding(Exploding):
    limit = 0.0


def test_a_rate_that_diverges_is_out_and_the_method_goes_on(
    llama: Base, files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "pissa", Exploding)
    progress = told(comparison(["pissa"], seeds=1), llama, files, tmp_path)
    pissa, lora = report_in(progress)["methods"]
    assert pissa["learning_rate"] == RATES[0]
    assert pissa["final"]["mean"] > 0
    assert lora["final"]["mean"] > 0
    assert [t["loss"] is None for t in pissa["search"][0]["trials"]] == [False, True, True]
    steps = [p for p in progress if isinstance(p, ComparedStep)]
    assert [step.step for step in steps] == sorted(step.step for step in steps)
    assert (steps[-1].step, steps[-1].run) == (steps[-1].total_steps, steps[-1].runs)


def test_a_method_that_always_diverges_is_reported_by_name(
    llama: Base, files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "pissa", AlwaysExploding)
    report = report_in(told(comparison(["pissa"], seeds=1), llama, files, tmp_path))
    pissa, _ = report["methods"]
    assert pissa["final"] is None
    assert "diverged after step" in pissa["problem"]
    assert report["verdict"]["take"] == "lora"
    assert "diverged after step" in (tmp_path / "comparison.html").read_text()


def test_a_method_that_does_not_fit_is_reported_by_name(
    llama: Base, files: tuple[Path, Path], tmp_path: Path
) -> None:
    spec = comparison([{"method": "olora", "rank": 64}, "lora"], seeds=1)
    progress = told(spec, llama, files, tmp_path)
    olora, lora = report_in(progress)["methods"]
    assert "adapter.rank = 64 is more than layer" in olora["problem"]
    assert lora["problem"] is None
    assert any("olora cannot be compared" in p.message for p in progress if isinstance(p, Note))


def test_where_nothing_fits_the_comparison_is_refused(
    llama: Base, files: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(SpecError, match="None of the methods"):
        told(comparison([{"method": "lora", "rank": 64}]), llama, files, tmp_path)


def test_the_base_is_left_as_it_was(llama: Base, files: tuple[Path, Path], tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in llama.model.state_dict().items()}
    told(comparison(seeds=1), llama, files, tmp_path / "whole")
    run = compare(comparison(seeds=1), llama, *files, tmp_path / "left")
    for progress in run:
        if isinstance(progress, ComparedStep) and progress.step == 5:
            break
    run.close()
    after = llama.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any(isinstance(module, AdaptedLinear) for module in llama.model.modules())


# --- stopping and resuming ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "run_step"), [("search", 3), ("search", STEPS), ("final", 7), ("final", STEPS)]
)
def test_a_resumed_comparison_has_the_same_report(
    base_folders: dict[str, Path],
    files: tuple[Path, Path],
    tmp_path: Path,
    stage: str,
    run_step: int,
) -> None:
    def fresh() -> Base:
        return load_base(base_folders["llama"], name="tiny-llama")

    spec = comparison([{"method": "olora", "dropout": 0.2}, "lora"])
    through = told(spec, fresh(), files, tmp_path / "through")
    run = compare(spec, fresh(), *files, tmp_path / "stopped")
    for progress in run:
        # In the second method, so that a search and finals are known.
        if isinstance(progress, ComparedStep) and (progress.method, progress.stage, progress.run_step) == (
            "lora",
            stage,
            run_step,
        ):
            saved = run.send("save")
            break
    run.close()
    assert isinstance(saved, Saved)
    assert saved.step == progress.step

    again = told(spec, fresh(), files, tmp_path / "on", resume=saved.folder)
    steps = [p.step for p in again if isinstance(p, ComparedStep)]
    assert steps[0] == saved.step + 1 if steps else saved.step == progress.total_steps
    rest = [p for p in through if isinstance(p, ComparedStep) and p.step > saved.step]
    assert [(p.step, p.total_steps, p.run, p.runs, p.loss) for p in again if isinstance(p, ComparedStep)] == [
        (p.step, p.total_steps, p.run, p.runs, p.loss) for p in rest
    ]
    assert without_timings(report_in(again)) == without_timings(report_in(through))


@pytest.mark.parametrize("are_named", [True, False], ids=["named", "by an earlier version"])
def test_a_resumed_comparison_keeps_to_the_default_rates_it_began_with(
    llama: Base, files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, are_named: bool
) -> None:
    """Defaults may change with a version; earlier ones did not write them down."""
    spec = comparison(["lora"], learning_rates="auto", seeds=1, hyperparameters={"max_steps": 8})
    through = told(spec, llama, files, tmp_path / "through")
    run = compare(spec, llama, *files, tmp_path / "stopped")
    for update in run:
        if isinstance(update, ComparedStep) and update.run == 3:
            saved = run.send("save")
            break
    run.close()
    if not are_named:
        identity = json.loads((saved.folder / "manifest.json").read_text())["identity"]
        snapshot = checkpoint.load(saved.folder, identity)
        del snapshot.state["default_rates"]
        checkpoint.save(saved.folder, snapshot)
    monkeypatch.setattr(LoRASpec, "base_learning_rate", 5 * LoRASpec.base_learning_rate)
    again = told(spec, llama, files, tmp_path / "on", resume=saved.folder)
    assert without_timings(report_in(again)) == without_timings(report_in(through))


def test_a_checkpoint_of_another_comparison_is_refused(
    llama: Base, files: tuple[Path, Path], tmp_path: Path
) -> None:
    progress = told(comparison(seeds=1), llama, files, tmp_path, checkpoint_seconds=0)
    saved = [p for p in progress if isinstance(p, Saved)]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    with pytest.raises(CheckpointError, match="another run: its comparison"):
        told(comparison(seeds=2), llama, files, tmp_path / "on", resume=saved[-1].folder)
    shorter = write_rows(tmp_path / "shorter.jsonl", chat_rows(40))
    with pytest.raises(CheckpointError, match="training data"):
        told(comparison(seeds=1), llama, (shorter, files[1]), tmp_path / "on", resume=saved[-1].folder)


def test_a_checkpoint_names_methods_as_the_spec_does(
    llama: Base, files: tuple[Path, Path], tmp_path: Path
) -> None:
    """As those of earlier versions; the report's labels have the budget's rank."""
    spec = comparison(["olora", {"method": "olora", "rank": 64}], learning_rates=[1e-3], seeds=1)
    progress = told(spec, llama, files, tmp_path, checkpoint_seconds=0)
    [*_, saved] = [p for p in progress if isinstance(p, Saved)]
    assert list(json.loads((saved.folder / "state.json").read_text())["unfit"]) == ["olora (rank 64)"]
    again = told(spec, llama, files, tmp_path / "on", resume=saved.folder)
    assert without_timings(report_in(again)) == without_timings(report_in(progress))
    labels = [method["label"] for method in report_in(again)["methods"]]
    assert labels[1:] == ["olora (rank 64)", "lora"]
    assert re.fullmatch(r"olora \(rank \d+ by budget\)", labels[0])


def test_a_failed_run_is_read_back_from_the_checkpoints_of_earlier_versions() -> None:
    """Their key for the error is `why`."""
    failed = RunResult("lora", "search", 0.3, 5, steps=4, error="It diverged after step 4.")
    state = json.loads(json.dumps(failed.state()))
    assert (state["why"], "error" in state) == (failed.error, False)
    assert RunResult.from_state(state | {"curve": ()}) == failed


# --- a validation share ------------------------------------------------------------------------------------


def test_a_share_held_out_gives_the_report_of_two_files_with_the_same_rows(
    llama: Base, files: tuple[Path, Path], tmp_path: Path
) -> None:
    spec = comparison(learning_rates=[1e-3, 3e-3], seeds=1, validation_share=0.25)
    data = result_of(read_data(spec.training, llama, files[0], None))
    rows = files[0].read_text().splitlines()
    apart = [
        write_rows(tmp_path / f"{role}.jsonl", [json.loads(rows[line - 1]) for line in examples.lines])
        for role, examples in (("kept", data.training), ("held", data.validation))
    ]
    of_share = report_in(compare(spec, llama, files[0], None, tmp_path / "share"))
    plain = comparison(learning_rates=[1e-3, 3e-3], seeds=1)
    of_files = report_in(compare(plain, llama, *apart, tmp_path / "files"))
    assert without_timings(of_share)["methods"] == without_timings(of_files)["methods"]
    held_out = {"share": 0.25, "seed": 5, "group_by": None, "examples": len(data.validation), "of": 45}
    assert of_share["validation"] == {
        "file": "train.jsonl",
        "sha256": of_share["training"]["sha256"],
        "examples": len(data.validation),
        "held_out": held_out,
    }
    winner = of_share["winner"]
    assert (winner["validation_share"], winner["seed"]) == (0.25, 5)
    assert not {"validation_file", "group_by"} & set(winner)
    page = (tmp_path / "share" / "comparison.html").read_text()
    assert "On the whole share held out of train.jsonl" in page
    assert "a share of 0.25 of that file, held out by seed 5" in page
    assert "validation file" not in page


def test_a_comparison_without_a_share_is_the_comparison_of_before(
    llama: Base, files: tuple[Path, Path], tmp_path: Path
) -> None:
    """A checkpoint's identity is a hash of the spec; those from before the option existed must stay valid."""
    spec = comparison(learning_rates=[1e-3], seeds=1)
    going = compare(spec, llama, *files, tmp_path, checkpoint_seconds=0)
    saved = next(update for update in going if isinstance(update, Saved))
    going.close()
    fields = json.loads(spec.model_dump_json())
    added = [fields.pop(name) for name in ("validation_share", "group_by", "columns")]
    added += [fields["hyperparameters"].pop(name) for name in ("train_on_reasoning", "control_tokens")]
    assert added == [None, None, None, True, "refuse"]
    before = json.dumps(fields, separators=(",", ":"), ensure_ascii=False)
    identity = json.loads((saved.folder / "manifest.json").read_text())["identity"]
    assert identity["comparison"] == hashlib.sha256(before.encode()).hexdigest()


def test_the_winner_reads_the_columns_that_the_comparison_read(
    llama: Base, files: tuple[Path, Path], tmp_path: Path
) -> None:
    renamed = []
    for file in files:
        rows = [json.loads(row) for row in file.read_text().splitlines()]
        renamed.append(
            write_rows(tmp_path / f"talk-{file.name}", [{"talk": row["messages"]} for row in rows])
        )
    one_run = {"learning_rates": [1e-3], "seeds": 1, "methods": ["lora"]}
    report = report_in(
        compare(comparison(**one_run, columns={"messages": "talk"}), llama, *renamed, tmp_path / "mapped")
    )
    plain = report_in(compare(comparison(**one_run), llama, *files, tmp_path / "plain"))
    assert report["winner"]["columns"] == {"messages": "talk"}
    assert without_timings(report)["methods"] == without_timings(plain)["methods"]
    assert "columns" not in plain["winner"]


def test_a_comparison_needs_one_source_of_validation_rows(
    llama: Base, files: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(SpecError, match="validation_file is missing") as error:
        next(compare(comparison(), llama, files[0], None, tmp_path))
    assert error.value.param == "validation_file"
    with pytest.raises(SpecError, match="exclude each other"):
        next(compare(comparison(validation_share=0.2), llama, *files, tmp_path))


# --- what is measured --------------------------------------------------------------------------------------


def test_the_report_is_written_beside_the_page_and_says_the_same(
    llama: Base, files: tuple[Path, Path], tmp_path: Path
) -> None:
    report = report_in(told(comparison(), llama, files, tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "comparison.json").read_text()) == report
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert report["methods"][0]["label"] in page
    olora, lora = report["methods"]
    below = [b - a for a, b in zip(olora["final"]["losses"], lora["final"]["losses"], strict=True)]
    assert olora["final"]["below_baseline"]["mean"] == pytest.approx(sum(below) / 2)
    assert lora["steps_to_baseline"] <= STEPS
    assert olora["tokens_per_second"] > 0


def test_a_data_set_is_taken_apart_without_changing_its_rows(llama: Base, files: tuple[Path, Path]) -> None:
    spec = read_spec(model="tiny")
    data = result_of(read_data(spec, llama, *files))
    taken = data.training.select(np.array([3, 0, 7]))
    assert len(taken) == 3
    for i, source in enumerate([3, 0, 7]):
        for own, whole in zip(taken.row(i), data.training.row(source), strict=True):
            assert np.array_equal(own, whole)
    assert taken.lines.tolist() == data.training.lines[[3, 0, 7]].tolist()
    assert taken.fingerprints.tolist() == data.training.fingerprints[[3, 0, 7]].tolist()
    assert taken.trained_lengths.tolist() == data.training.trained_lengths[[3, 0, 7]].tolist()


def test_peak_memory_forgets_what_was_before() -> None:
    device = torch.device("cpu")
    large = torch.ones(100 * 2**20)  # 400 MB
    with_it = peak_memory(device)
    del large
    forget_peak_memory(device)
    assert peak_memory(device) < with_it - 300 * 2**20
