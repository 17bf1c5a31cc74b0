"""The default learning rate: measured before the first step, and nothing of the run is changed by that."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from olora_core.bases.loading import Base, load_base
from olora_core.data.batches import epoch_order
from olora_core.errors import SpecError
from olora_core.methods import METHODS
from olora_core.progress import Evaluated, Finished, Phase, Progress, Resolved, Saved, Step
from olora_core.specs import TrainSpec, learning_rate_for
from olora_core.training import checkpoint, measured_rate
from olora_core.training.measured_rate import MeasuredRate, best_power, next_trial
from olora_core.training.train import train

from ..runs import chat_rows, one, preference_rows, spec_for, write_rows

ROWS = 60
AUTO = {"learning_rate": "auto", "n_epochs": 2}
"""Thirty steps of four examples."""


@pytest.fixture
def training(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "training.jsonl", chat_rows(ROWS))


@pytest.fixture
def measurements(monkeypatch) -> list[MeasuredRate]:
    """What the runs of a test have measured."""
    seen: list[MeasuredRate] = []
    measure = measured_rate.measure_rate

    def watched(run):
        seen.append((yield from measure(run)))
        return seen[-1]

    monkeypatch.setattr(measured_rate, "measure_rate", watched)
    return seen


def rate_of(updates: list[Progress]) -> float:
    return one(Resolved, updates).spec.hyperparameters.learning_rate


def between(table: float, measured: float) -> float:
    """The geometric mean, to two digits."""
    return float(f"{math.exp((math.log(table) + math.log(measured)) / 2):.2g}")


def reason_of(updates: list[Progress]) -> str:
    (found,) = [sentence for sentence in one(Resolved, updates).why if sentence.startswith("learning_rate")]
    return found


def adapter_of(updates: list[Progress]) -> dict[str, Any]:
    return load_file(one(Finished, updates).folder / "adapter_model.safetensors")


def assert_same_adapter(ours: list[Progress], others: list[Progress]) -> None:
    mine, theirs = adapter_of(ours), adapter_of(others)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert np.array_equal(tensor.numpy(), theirs[name].numpy()), name


# --- the search ----------------------------------------------------------------------------------------


def search(loss: Callable[[int], float]) -> dict[int, float]:
    losses: dict[int, float] = {}
    while (power := next_trial(losses)) is not None:
        losses[power] = loss(power)
    return losses


@pytest.mark.parametrize("vertex", [-3.3, -0.4, 0.0, 1.75, 4.2])
def test_the_search_finds_the_vertex_of_a_parabola(vertex) -> None:
    losses = search(lambda power: 1.5 + 0.1 * (power - vertex) ** 2)
    assert best_power(losses) == pytest.approx(vertex)
    assert sorted(losses) == list(range(min(losses), max(losses) + 1))
    assert len(losses) <= 3 + abs(round(vertex))


@pytest.mark.parametrize("edge", [math.inf, math.nan])
def test_a_rate_that_diverges_bounds_the_search(edge) -> None:
    losses = search(lambda power: math.inf if power > 1 else 2.0 - power)
    assert max(losses) == 2
    assert best_power(losses) == 1


def test_the_search_ends_where_no_rate_is_the_best() -> None:
    assert len(search(lambda power: -power)) == measured_rate.MOST_TRIALS
    assert len(search(lambda power: math.inf)) <= measured_rate.MOST_TRIALS
    assert len(search(lambda power: 1.0)) <= measured_rate.MOST_TRIALS


# --- a measured run ------------------------------------------------------------------------------------


def test_a_trial_is_what_a_run_at_a_constant_rate_would_be(run, training, tmp_path, measurements) -> None:
    run(spec_for("olora", **AUTO))
    (measured,) = measurements
    order = epoch_order(ROWS, seed=5, epoch=0)
    lines = training.read_text().splitlines()
    after = order[4 * 4 : 4 * 4 + 24]
    judged = tmp_path / "judged.jsonl"
    judged.write_text("".join(f"{lines[i]}\n" for i in after))
    assert len(measured.trials) >= 3
    for rate, loss in measured.trials[:3]:
        constant = {"schedule": "constant", "warmup_ratio": 0.0, "max_grad_norm": 1e9, "max_steps": 4}
        updates = run(spec_for("olora", learning_rate=rate, **constant), validation=judged)
        (last,) = [update for update in updates if isinstance(update, Evaluated) and update.step == 4]
        assert loss == pytest.approx(last.loss, abs=1e-6)


def test_the_rate_is_between_the_tables_and_a_multiple_of_the_best_trial(run, measurements) -> None:
    spec = spec_for("lora", **AUTO)
    updates = run(spec)
    (measured,) = measurements
    best, _ = min(measured.trials, key=lambda trial: trial[1])
    assert best / 2 <= measured.rate / measured_rate.PEAK <= 2 * best
    table = learning_rate_for(spec.adapter, 32)
    assert rate_of(updates) == between(table, measured.rate)
    assert reason_of(updates).startswith(
        f"learning_rate = {rate_of(updates):g} (auto: between the table's {table:g} and the measured "
        f"{measured.rate:g}; after 4 steps the loss on 24 other examples was "
    )
    assert any(isinstance(update, Phase) and update.name == "measuring" for update in updates)
    peak = max(update.learning_rate for update in updates if isinstance(update, Step))
    assert peak == pytest.approx(rate_of(updates))


@pytest.mark.parametrize("method", METHODS)
def test_measuring_leaves_a_run_as_it_was(run, method, measurements, monkeypatch) -> None:
    """Dropout, restarts, pruning, gates: whatever a method keeps is as if nothing had been tried."""
    monkeypatch.setattr(measured_rate, "FEWEST_RUN_STEPS", 6)
    monkeypatch.setattr(measured_rate, "MOST_TRIALS", 3)
    short = {"adapter": {"dropout": 0.2}, "max_steps": 6}
    measured = run(spec_for(method, **AUTO, **short))
    assert len(measurements) == 1
    given = run(spec_for(method, **AUTO | {"learning_rate": rate_of(measured)}, **short))
    assert [u.loss for u in measured if isinstance(u, Step)] == [u.loss for u in given if isinstance(u, Step)]
    assert_same_adapter(measured, given)


def test_it_is_measured_for_preferences(run, tmp_path, measurements) -> None:
    pairs = write_rows(tmp_path / "pairs.jsonl", preference_rows(ROWS))
    updates = run(spec_for("olora", type="dpo", **AUTO), training=pairs)
    (measured,) = measurements
    assert rate_of(updates) == between(learning_rate_for(spec_for("olora").adapter, 32), measured.rate)
    assert min(loss for _, loss in measured.trials) < math.log(2)


def test_it_is_measured_on_a_quantised_base(base_folders, run, measurements) -> None:
    base = load_base(base_folders["wide-llama"], name="wide", quantization="int8")
    updates = run(spec_for("olora", quantization="int8", **AUTO), base=base)
    assert rate_of(updates) == between(
        learning_rate_for(spec_for("olora").adapter, 128), measurements[0].rate
    )


def test_a_multiplier_multiplies_what_was_found(run, measurements) -> None:
    updates = run(spec_for("olora", **AUTO, learning_rate_multiplier=0.5))
    mean = between(learning_rate_for(spec_for("olora").adapter, 32), measurements[0].rate)
    assert rate_of(updates) == 0.5 * mean
    assert f"(auto: 0.5 times {mean:g}, between the table's" in reason_of(updates)


def test_a_multiplier_that_makes_it_too_high_is_an_error(run) -> None:
    with pytest.raises(SpecError, match="learning_rate"):
        run(spec_for("olora", **AUTO, learning_rate_multiplier=1e6))


# --- where nothing is measured -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"learning_rate": "table", "n_epochs": 2}, AUTO | {"max_steps": 29}, {"learning_rate": 1e-3}],
    ids=["table", "few steps", "a number"],
)
def test_nothing_is_measured(run, measurements, options) -> None:
    run(spec_for("olora", **options))
    assert measurements == []


def test_nothing_is_measured_with_few_examples(run, tmp_path, measurements) -> None:
    few = write_rows(tmp_path / "few.jsonl", chat_rows(39))
    updates = run(spec_for("olora", **AUTO | {"n_epochs": 4}), training=few)
    assert measurements == []
    assert reason_of(updates) == (
        f"learning_rate = {rate_of(updates):g} (auto: OLoRA's default for rank 4, scale 1 and hidden size 32)"
    )


# --- resuming ------------------------------------------------------------------------------------------


def interrupted(run_folder: Path, spec: TrainSpec, base: Base, training: Path) -> tuple[Path, float]:
    """The checkpoint of a run that was stopped after ten steps, and the run's rate."""
    updates = train(spec, base, training, None, run_folder)
    update, rate = next(updates), 0.0
    while True:
        if isinstance(update, Resolved):
            rate = update.spec.hyperparameters.learning_rate
        if isinstance(update, Saved):
            updates.close()
            return update.folder, rate
        stop = isinstance(update, Step) and update.step == 10
        update = updates.send("save") if stop else next(updates)


def test_a_resumed_run_has_the_rate_that_was_measured_before(
    run, llama, training, tmp_path, monkeypatch, measurements
) -> None:
    spec = spec_for("olora", **AUTO)
    whole = run(spec)
    saved, rate = interrupted(tmp_path / "cut", spec, llama, training)
    measurements.clear()
    monkeypatch.setattr(measured_rate, "PEAK", 17.0)
    resumed = run(spec, resume=saved)
    assert measurements == []
    assert rate_of(resumed) == rate == rate_of(whole)
    assert reason_of(resumed) == f"learning_rate = {rate:g} (as in the checkpoint)"
    assert_same_adapter(resumed, whole)


@pytest.mark.parametrize("options", [{}, {"learning_rate_multiplier": 0.3}], ids=["alone", "multiplied"])
@pytest.mark.parametrize("method", ["olora", "sora"])
def test_a_checkpoint_that_does_not_name_its_rate_has_an_earlier_tables(
    run, llama, training, tmp_path, monkeypatch, method, options
) -> None:
    """Earlier versions wrote no rate, and had other defaults."""
    spec = spec_for(method, **AUTO | {"learning_rate": "table"} | options)
    whole = run(spec)
    saved, rate = interrupted(tmp_path / "cut", spec, llama, training)
    snapshot = checkpoint.load(saved, json.loads((saved / "manifest.json").read_text())["identity"])
    del snapshot.state["learning_rate"]
    checkpoint.save(saved, snapshot)
    monkeypatch.setattr(type(spec.adapter), "base_learning_rate", 3 * spec.adapter.base_learning_rate)
    resumed = run(spec, resume=saved)
    assert rate_of(resumed) == rate
    assert_same_adapter(resumed, whole)
