"""One job on two devices gives what it gives on one: two processes, which talk through gloo on the CPU."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from olora_core.bases.loading import load_base
from olora_core.devices import deal
from olora_core.specs import RunFacts, resolve

from .pair import Pair, run_case
from .runs import chat_rows, preference_rows, spec_for, write_rows
from .training.test_weights import cache_with, weighted

NINE = 9  # with four a batch, the third batch has one row, and one process none
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "accumulated": ("llama", {}, {}),
    "lora": ("llama", {"method": "lora"}, {}),
    "pissa": ("llama", {"method": "pissa"}, {}),
    "melora": ("llama", {"method": "melora", "adapter": {"dropout": 0.2}}, {}),
    "tt_lora": ("llama", {"method": "tt_lora"}, {}),
    "ba_lora": ("llama", {"method": "ba_lora", "micro_batch_size": 1}, {}),
    "prilora": ("llama", {"method": "prilora", "adapter": {"prune_every": 2}, "packing": False}, {}),
    "adalora": ("llama", {"method": "adalora", "micro_batch_size": 1}, {}),
    "rm_lora": ("llama", {"method": "rm_lora", "micro_batch_size": 1}, {}),
    "sora": ("llama", {"method": "sora", "adapter": {"threshold": 0.1}}, {}),
    "cola": ("llama", {"method": "cola", "adapter": {"dropout": 0.2}, "warmup_ratio": 0}, {}),
    "xgblora": ("llama", {"method": "xgblora", "adapter": {"steps_per_round": 2, "layers_per_round": 1}}, {}),
    "mora": ("llama", {"method": "mora", "adapter": {"restart_every": 2, "ramp_steps": 2}}, {}),
    "mora of type 6": ("llama", {"method": "mora", "adapter": {"type": 6, "export": "merged"}}, {}),
    "sharded, mora of type 6": (
        "llama",
        {"method": "mora", "adapter": {"type": 6, "export": "merged"}, "sharding": "full"},
        {},
    ),
    "dropout": ("llama", {"adapter": {"dropout": 0.2}}, {}),
    "noisy embeddings": ("llama", {"neftune_alpha": 5}, {}),
    "stopped early": (
        "llama",
        {"eval_steps": 1, "early_stopping_patience": 1, "early_stopping_min_delta": 9.0},
        {},
    ),
    "weighted tokens": ("llama", {"micro_batch_size": 1}, {"weighted": True}),
    "sharded, weighted tokens": ("llama", {"sharding": "full"}, {"weighted": True}),
    "one row a micro-batch": ("llama", {"micro_batch_size": 1}, {}),
    "packed on GPT-2": ("gpt2", {"packing": True}, {}),
    "preferences": ("llama", {"type": "dpo"}, {}),
    "with a penalty": ("llama", {"method": "lora", "micro_batch_size": 1}, {"penalised": True}),
    "with an idle tensor": ("llama", {"method": "lora", "weight_decay": 0.5}, {"idle": True}),
    "short of memory once": ("llama", {"method": "lora"}, {"short": True}),
    "at a measured rate": ("llama", {"micro_batch_size": 1, "learning_rate": "auto"}, {"measured": True}),
    "sharded, at a measured rate": (
        "llama",
        {"sharding": "full", "learning_rate": "auto"},
        {"measured": True},
    ),
    "sharded": ("llama", {"adapter": {"dropout": 0.2}, "sharding": "full"}, {}),
    "sharded GPT-2, packed": ("gpt2", {"packing": True, "sharding": "full"}, {}),
    "sharded, checkpointed": ("llama", {"gradient_checkpointing": True, "sharding": "full"}, {}),
    "sharded, preferences": ("llama", {"type": "dpo", "sharding": "full"}, {}),
    "sharded, prilora": ("llama", {"method": "prilora", "packing": False, "sharding": "full"}, {}),
    "sharded, with a penalty": ("llama", {"method": "lora", "sharding": "full"}, {"penalised": True}),
    "sharded, ba_lora": (
        "llama",
        {"method": "ba_lora", "adapter": {"lambda_consistency": 0.5}, "sharding": "full"},
        {},
    ),
}
STEPS = {"stopped early": 2}
"""Of six, three an epoch."""
RESUMED = ("dropout", "sharded")
STOPPED_AFTER = 2


def case_of(name: str, base_folders: dict[str, Path], files: dict[str, tuple[Path, Path]]) -> dict[str, Any]:
    base, options, more = CASES[name]
    spec = spec_for(**options)
    training, validation = files[spec.type]
    if more.get("weighted"):
        more = {"cache": str(training.parent / "weighted")}
    return {
        "spec": spec.model_dump(mode="json"),
        "base": str(base_folders[base]),
        "training": str(training),
        "validation": str(validation),
        "sharding": spec.hyperparameters.sharding,
        **more,
    }


@pytest.fixture(scope="module")
def files(
    tmp_path_factory: pytest.TempPathFactory, base_folders: dict[str, Path]
) -> dict[str, tuple[Path, Path]]:
    folder, files = tmp_path_factory.mktemp("files"), {}
    for kind, rows in (("supervised", chat_rows(NINE + 5)), ("dpo", preference_rows(NINE + 5))):
        training = write_rows(folder / f"{kind}.jsonl", rows[:NINE])
        files[kind] = training, write_rows(folder / f"{kind}-validation.jsonl", rows[NINE:])
    base = load_base(base_folders["llama"], name="tiny")
    cache_with(weighted, base, *files["supervised"], folder / "weighted")
    return files


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """One for all runs of this file, one after another: those that were stopped leave it in order too."""
    pair = Pair(tmp_path_factory.mktemp("pair"))
    yield pair
    assert pair.close() == [0, 0]


@pytest.fixture(scope="module")
def two(pair, base_folders, files, tmp_path_factory) -> dict[str, list[dict[str, Any]]]:
    """Both processes' results in each case; in some also of a run that was stopped, and of it resumed."""
    root, results = tmp_path_factory.mktemp("two"), {}

    def run(name: str, **more: Any) -> list[dict[str, Any]]:
        folder = root / f"{len(results)}"
        pair.begin(case_of(name, base_folders, files) | {"folder": str(folder)} | more)
        return [pair.answer(0), pair.answer(1)]

    for name in CASES:
        if name in RESUMED:
            results[f"{name}, stopped"] = run(name, stop_after=STOPPED_AFTER)
            results[f"{name}, resumed"] = run(name, resume=results[f"{name}, stopped"][0]["saved"])
        results[name] = run(name)
    return results


@pytest.fixture(scope="module")
def one(base_folders, files, tmp_path_factory) -> dict[str, dict[str, Any]]:
    root = tmp_path_factory.mktemp("one")
    return {
        name: run_case(case_of(name, base_folders, files) | {"folder": str(root / name.replace(" ", "-"))})
        for name in CASES
    }


def near(found: list[Any], expected: list[Any]) -> None:
    """Lists of numbers or of rows; what is None in one, such as a validation not yet due, is None in both."""
    ours, theirs = (torch.tensor(np.array(values, dtype=float)) for values in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5, equal_nan=True)


@pytest.mark.methods
@pytest.mark.parametrize("name", CASES)
def test_two_devices_give_the_losses_of_one(one, two, name) -> None:
    lone, (main, other) = one[name], two[name]
    assert len(lone["steps"]) == STEPS.get(name, 6)
    assert lone["evaluated"] or any(valid_loss is not None for *_, valid_loss in lone["steps"])
    for key in ("steps", "evaluated"):
        near(main[key], lone[key])
        assert other[key] == main[key]
    for key in ("trained_tokens", "tokens"):
        assert main[key] == lone[key]
    if CASES[name][1].get("type") == "dpo":
        near(main["margins"], lone["margins"])


@pytest.mark.methods
@pytest.mark.parametrize("name", CASES)
def test_both_hold_the_same_adapter_after_every_step_and_one_exports_it_certified(two, name) -> None:
    main, other = two[name]
    assert main["digests"] == other["digests"]
    assert len(set(main["digests"])) == STEPS.get(name, 6)
    assert main["certified"] is True
    assert "certified" not in other
    assert not other["wrote"]


@pytest.mark.parametrize("name", CASES)
def test_the_base_keeps_its_values_and_adapters_off_is_the_base(two, name) -> None:
    assert all(result["off"] for result in two[name])


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_on_two_devices_resumes_bit_for_bit(two, name) -> None:
    for unbroken, stopped, resumed in zip(
        two[name], two[f"{name}, stopped"], two[f"{name}, resumed"], strict=True
    ):
        for key in ("steps", "digests"):
            assert stopped[key] == unbroken[key][:STOPPED_AFTER], "both left at the same step"
            assert resumed[key] == unbroken[key][STOPPED_AFTER:]
    assert two[f"{name}, resumed"][0]["exported"] == two[name][0]["exported"]


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_on_two_devices_goes_on_on_one(two, base_folders, files, tmp_path, name) -> None:
    checkpoint = two[f"{name}, stopped"][0]["saved"]
    case = case_of(name, base_folders, files) | {"folder": str(tmp_path / "run"), "resume": checkpoint}
    near(run_case(case)["steps"], two[name][0]["steps"][STOPPED_AFTER:])


def test_the_weights_of_tokens_count_on_two_devices(one, two) -> None:
    for name in ("weighted tokens", "sharded, weighted tokens"):
        for result in (one[name], *two[name]):
            losses = [loss for _, loss, *_ in result["steps"]]
            assert losses != pytest.approx([loss for _, loss, *_ in one["accumulated"]["steps"]], rel=1e-3)


def test_the_rate_that_is_measured_is_that_of_one_device(one, two) -> None:
    for name in ("at a measured rate", "sharded, at a measured rate"):
        [expected] = [sentence for sentence in one[name]["why"] if sentence.startswith("learning_rate")]
        assert "and the measured" in expected
        for result in two[name]:
            assert expected in result["why"]


def test_a_tensor_without_a_gradient_stays_as_it_is(two) -> None:
    """With a gradient of zeros, as a sum over nothing would give it, the optimizer would shrink it."""
    for result in two["with an idle tensor"]:
        assert result["idle"]
        assert all(values == [1.0] * 3 for values in result["idle"])


def test_memory_that_runs_out_on_one_device_has_all_begin_the_step_again(one, two) -> None:
    assert all(result["short"] for result in (one["short of memory once"], *two["short of memory once"]))


def test_a_method_can_pool_what_the_devices_saw(one, two) -> None:
    for name in ("with a penalty", "sharded, with a penalty"):
        for result in two[name]:
            near(result["statistic"], one[name]["statistic"])


def test_an_error_in_both_processes_is_reported_once_and_the_next_run_works(
    pair, base_folders, files, tmp_path
) -> None:
    case = case_of("lora", base_folders, files)
    (tmp_path / "empty").mkdir()
    pair.begin(case | {"folder": str(tmp_path / "a"), "resume": str(tmp_path / "empty")})
    main, other = pair.answer(0), pair.answer(1)
    assert main["error"][0] == "invalid_checkpoint"
    assert "error" not in other
    pair.begin(case | {"folder": str(tmp_path / "b")})
    assert all(len(pair.answer(rank)["steps"]) == 6 for rank in (0, 1))


def test_micro_batches_are_dealt_evenly_and_each_once() -> None:
    sizes = [7, 1, 1, 5, 3, 3]
    shares = deal(sizes, 2)
    assert sorted(shares[0] + shares[1]) == list(range(6))
    assert [sum(sizes[i] for i in share) for share in shares] == [10, 10]
    assert deal([4], 3) == [[0], [], []]
    assert deal([], 2) == [[], []]


def test_an_automatic_micro_batch_leaves_none_without_work() -> None:
    asked = spec_for(batch_size=8, micro_batch_size="auto")
    for devices, size in ((1, 8), (2, 4), (3, 3), (16, 1)):
        spec, _ = resolve(asked, RunFacts(100, 32, 128, devices=devices))
        assert spec.hyperparameters.micro_batch_size == size


@pytest.mark.slow
@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_dies_or_hangs_ends_the_run_with_a_sentence(base_folders, files, tmp_path, by) -> None:
    pair = Pair(tmp_path, timeout_seconds=4)
    case = case_of("lora", base_folders, files)
    case["spec"]["hyperparameters"]["n_epochs"] = 50
    pair.begin(case | {"folder": str(tmp_path / "warm"), "stop_after": 1})
    assert pair.answer(0)["saved"]
    pair.answer(1)
    pair.begin(case | {"folder": str(tmp_path / "run")})
    while not list((tmp_path / "run-0").glob("checkpoints/*")):
        time.sleep(0.02)
    pair.processes[1].send_signal(by)
    began = time.monotonic()
    code, sentence = pair.answer(0)["error"]
    assert time.monotonic() - began < 8
    assert code == "process_lost"
    assert "resumed from its last checkpoint" in sentence
    pair.processes[1].kill()
    pair.close()
    assert all(not Path(f"/proc/{process.pid}").exists() for process in pair.processes)
