"""The training benchmark: every arm runs and learns the same; what did not learn the same gets no ratio."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import olora_core.training.losses
from bench import arms, materials, train
from olora_core.bases import precision
from olora_core.methods.lora import LoRAAdapter

# The peers' libraries warn of one another.
pytestmark = pytest.mark.filterwarnings("ignore")

STEPS = ["--steps", "2", "--warm-up", "1", "--batch-size", "8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and 16 rows of mixed lengths, prepared for the arms."""
    folder = tmp_path_factory.mktemp("material")
    materials.make(folder, model="tiny", data="mixed", rows=16)
    arms.main(["prepare", str(folder), *STEPS])
    return folder


@pytest.fixture
def _switches_end_with_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an arm switches off in its own process, is on again after the test."""
    monkeypatch.setattr(LoRAAdapter, "forward", LoRAAdapter.forward)
    monkeypatch.setattr(LoRAAdapter, "delta", LoRAAdapter.delta)
    monkeypatch.setattr(
        olora_core.training.losses, "FrozenHeadLoss", olora_core.training.losses.FrozenHeadLoss
    )


def run(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    arms.main([name, str(folder), *STEPS])
    told: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return told


@pytest.fixture(scope="module")
def ours(folder: Path) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        patch.setattr(arms.sys.stdout, "write", said.append)
        arms.main(["ours", str(folder), *STEPS])
    told: dict[str, Any] = json.loads(said[-1])
    return told


@pytest.mark.parametrize(("dtype", "autocast"), [(torch.float32, False), (torch.bfloat16, True)])
def test_tuned_peers_train_in_the_dtype_that_is_faster_on_this_machine(
    dtype: torch.dtype, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer in emulated bf16 would flatter ours."""
    monkeypatch.setattr(precision, "compute_dtype", lambda *_: dtype)
    task = arms.Task(Path("anywhere"), steps=2, warm_up=1, batch_size=8, device="cpu")
    for name in ("trainer", "trl-tuned", "trainer-4-rows"):
        arm = arms.in_faster_dtype(task, arms.ARMS[name])
        assert (arm.dtype, arm.options["bf16"]) == (str(dtype).removeprefix("torch."), autocast)
    for name in ("trainer-fp32", "trainer-no-autocast", "trl"):
        assert arms.in_faster_dtype(task, arms.ARMS[name]) is arms.ARMS[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in arms.ARMS if name != "ours"])
@pytest.mark.usefixtures("_switches_end_with_the_test")
def test_every_arm_trains_and_learns_what_ours_does(
    name: str, folder: Path, ours: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    told = run(name, folder, capsys)
    assert len(told["losses"]) == 2
    assert told["tokens_per_second"] > 0
    assert told["peak_bytes"] > 0
    step, held_out = train.differences(ours, told)
    assert (step is None) == (not arms.ARMS[name].same_batches)
    assert step is None or step < train.STEP_TOLERANCE
    assert held_out < train.HELD_OUT_TOLERANCE


def test_mixed_lengths_are_spread_evenly_on_a_logarithmic_scale_and_half_of_each_is_an_answer(
    tmp_path: Path,
) -> None:
    materials.make(tmp_path, model="tiny", data="mixed", rows=200)
    told = prepared(tmp_path)
    shortest, median, _, longest = told["lengths"]
    assert 28 <= shortest < 40
    assert 400 < longest <= 512
    assert 100 < median < 160  # sqrt(32 · 512) = 128
    assert 0.4 < told["trained"] < 0.55


def prepared(folder: Path) -> dict[str, Any]:
    return arms.prepare(arms.Task(folder, steps=25, warm_up=1, batch_size=8, device="cpu"))


@pytest.mark.slow
def test_the_table_has_a_row_for_each_arm(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--models", "tiny", "--data", "docstrings", "--rounds", "1", "--threads", "1"]
    train.main([*small, *STEPS, "--arms", "ours", "trainer"])
    printed, as_it_went = capsys.readouterr()
    assert [line.split(" tokens/s")[0].rsplit(" ", 1)[0] for line in as_it_went.splitlines()][-2:] == [
        "tiny, docstrings, round 1 of 1: ours",
        "tiny, docstrings, round 1 of 1: trainer",
    ]
    assert "1 threads" in printed
    first, second = (
        line.split(" | ") for line in printed.splitlines() if line.startswith(("| ours", "| tr"))
    )
    assert (first[0], second[0]) == ("| ours", "| trainer")
    assert float(second[3].split()[0]) > 0
    assert second[7] == "other batches"


def test_arms_that_did_not_learn_the_same_get_no_ratio() -> None:
    one = {
        "losses": [3.0, 2.0],
        "held_out": 2.5,
        "tokens_per_second": 2.0,
        "tokens_per_cpu_second": 2.0,
        "peak_bytes": 1,
        "dtype": "float32",
        "same_batches": True,
    }
    assert train.row("trl", [one], [{**one, "tokens_per_second": 1.0}]).split(" | ")[3] == "2.00 (2.00–2.00)"
    for other in ({"losses": [3.0, 1.9]}, {"held_out": 2.6}):
        assert "losses differ" in train.row("trl", [one], [{**one, **other}])
    by_design = {"losses": [9.0, 9.0], "same_batches": False}
    assert "losses differ" not in train.row("trainer", [one], [{**one, **by_design}])


def test_an_arm_that_fails_ends_the_benchmark_with_its_last_words(tmp_path: Path) -> None:
    asked = argparse.Namespace(threads=1, device="cpu")
    with pytest.raises(SystemExit, match="warm-up must be at least 1"):
        train.run_child(["bench.arms", "ours", str(tmp_path), "--warm-up", "0"], asked)
