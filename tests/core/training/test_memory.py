"""What a run says it will need, against what it needs; and what it does when that was not enough."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from olora_core.bases.loading import Base, load_base
from olora_core.bases.sites import target_sites
from olora_core.errors import SpecError, TrainingError
from olora_core.layers.adapter import detach
from olora_core.methods import METHODS
from olora_core.methods.base import build_adapters
from olora_core.progress import Finished, Note, Progress, Resolved, Saved, Step
from olora_core.training import losses as loss_room
from olora_core.training import memory
from olora_core.training.losses import loss_of
from olora_core.training.memory import Estimate, LiveBytes, estimate_memory, fitted
from olora_core.training.train import train
from tests.tiny_base import CONTEXT, VOCABULARY, save_base

from ..runs import chat_rows, losses, one, preference_rows, spec_for, write_rows

ROOT = Path(__file__).parents[3]


def test_live_bytes_are_those_of_all_tensors_alive_at_once() -> None:
    with LiveBytes() as live:
        a = torch.zeros(1000)
        b = a[:500] + 1  # a view is no tensor of its own
        del a
        c = b * 2
        c.mul_(3)
    assert (live.peak, live.now) == (6000, 4000)


def test_the_heads_loss_holds_one_chunk_of_logits_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three chunks take no more than one does, beside what grows with the rows."""
    positions, vocabulary, width = 8, 4096, 4
    monkeypatch.setattr(loss_room, "LOGITS_AT_ONCE", positions * vocabulary)
    weight = torch.randn(vocabulary, width, generator=torch.Generator().manual_seed(0))

    def peak(rows: int) -> int:
        hidden = torch.ones(rows, width, requires_grad=True)
        targets = torch.arange(rows)
        with LiveBytes() as live:
            loss_room.FrozenHeadLoss.apply(hidden, weight, None, targets, 0.0)
        return live.peak

    chunk = positions * vocabulary * 4
    assert peak(positions) > chunk
    assert peak(3 * positions) < peak(positions) + chunk // 8


def test_a_pass_without_a_quadratic_term_is_fitted_as_a_line() -> None:
    """Peaks of 1000 + 10 T, the middle one 5 % higher, as an allocator rounds: c would be negative."""
    rows = np.array([[1, length, length**2] for length in (32, 64, 128)], dtype=float)
    peaks = 1000 + 10 * rows[:, 1]
    peaks[1] *= 1.05
    a, b, c = fitted(rows, peaks)
    slope, start = np.polyfit(rows[:, 1], peaks, 1)
    assert c == 0
    assert (a, b) == pytest.approx((start, slope))
    quadratic = 2000 + 30 * rows[:, 1] + 0.5 * rows[:, 2]
    assert fitted(rows, quadratic) == pytest.approx((2000, 30, 0.5))


def estimate(**changes: Any) -> Estimate:
    known = {
        "used": 1000,
        "free": 10_000,
        "optimizer": 300,
        "passes": (0.0, 10.0, 0.0),
        "layers": 10,
        "layer_input": 2,
        "head": 0,
        "penalty": 0,
        "slack": 1.0,
        "whole": 20_000,
    }
    return Estimate(**known | changes)


def test_what_fits_leaves_some_memory_free() -> None:
    """10 bytes a token and 300: 770 tokens are 8,000 of 10,000 bytes."""
    assert estimate().fits(770, 10)
    assert not estimate().fits(771, 10)


def test_checkpointed_blocks_keep_their_inputs_and_one_block() -> None:
    assert estimate().activations(100, 10) == 1000
    assert estimate().activations(100, 10, checkpointing=True) == 1000 / 10 + 100 * 2 * 10


def test_what_a_penalty_holds_is_counted(llama, training, tmp_path) -> None:
    assert estimate(penalty=5).activations(100, 10) == 1000 + 500
    estimates = []
    for weight in (0.0, 0.1):
        weights = dict.fromkeys(("lambda_consistency", "lambda_diversity", "lambda_spectrum"), weight)
        settings = {"packing": True, "adapter": weights, "micro_batch_tokens": 4096}
        progress = begun(llama, training, tmp_path / str(weight), method="ba_lora", **settings)
        (note,) = [p for p in progress if isinstance(p, Note) and "Estimated peak memory" in p.message]
        estimates.append(note.data)
    assert estimates[1]["activation_bytes"] - estimates[0]["activation_bytes"] >= 6 * 4096 * VOCABULARY * 4


# --- what "auto" becomes -------------------------------------------------------------------------------


@pytest.fixture
def training(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "training.jsonl", chat_rows())


def begun(base: Base, training: Path, folder: Path, **settings: Any) -> list[Progress]:
    """A run of one step."""
    return list(train(spec_for(max_steps=1, **settings), base, training, None, folder))


def with_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(memory, "memory_of", lambda device: (1000, free, 2**40))


def test_with_room_enough_a_pass_is_as_large_as_is_fast(llama, training, tmp_path, monkeypatch) -> None:
    with_free(monkeypatch, 2**40)
    progress = begun(llama, training, tmp_path)
    chosen = one(Resolved, progress).spec.hyperparameters
    assert (chosen.micro_batch_tokens, chosen.packing, chosen.gradient_checkpointing) == (2048, True, False)
    (note,) = [p for p in progress if isinstance(p, Note) and "Estimated peak memory" in p.message]
    assert note.level == "info"


def test_the_processes_of_one_job_share_a_cpus_memory(llama, monkeypatch) -> None:
    with_free(monkeypatch, 2**40)
    spec = spec_for("lora")
    method = METHODS["lora"](spec.adapter, seed=0, total_steps=1, schedule=lambda step, steps: 1.0)
    adapters = build_adapters(method, llama.model, target_sites(llama.model, "auto"))
    try:
        alone, together = (
            estimate_memory(spec, llama, adapters, loss_of(spec), needs_logits=False, processes=n).free
            for n in (1, 2)
        )
    finally:
        detach(llama.model)
    assert (alone, together) == (2**40, 2**39)


def test_with_little_room_passes_shrink_and_then_blocks_are_checkpointed(
    llama, training, tmp_path, monkeypatch
) -> None:
    found = []
    for free in (2**40, 2**22, 2**18):
        with_free(monkeypatch, free)
        progress = begun(llama, training, tmp_path / str(free))
        chosen = one(Resolved, progress).spec.hyperparameters
        found.append((chosen.micro_batch_tokens, chosen.gradient_checkpointing, losses(progress)))
    (most, off, plain), (fewer, still_off, cut), (_, on, checkpointed) = found
    assert most > fewer
    assert (off, still_off, on) == (False, False, True)
    assert cut == pytest.approx(plain, rel=1e-5)
    assert checkpointed == pytest.approx(plain, rel=1e-5)
    (note,) = [p for p in progress if isinstance(p, Note) and "Estimated peak memory" in p.message]
    assert note.level == "warn"


def test_a_pass_takes_an_eighth_of_a_machines_memory_unless_that_is_slow() -> None:
    """1 MB a token: 512 tokens take more than an eighth of 2 GB, but fewer would cost speed."""
    sizes = {"passes": (0.0, 2.0**20, 0.0), "free": 2**40, "whole": 2**31}
    assert memory._tokens_of_a_pass(estimate(**sizes), 100, 100, "cpu", False) == 512
    assert memory._tokens_of_a_pass(estimate(**sizes), 100, 100, "cuda", False) == 16384
    sizes["passes"] = (0.0, 150 * 2.0**10, 0.0)
    assert memory._tokens_of_a_pass(estimate(**sizes), 100, 100, "cpu", False) == 1024
    sizes["whole"] *= 2
    assert memory._tokens_of_a_pass(estimate(**sizes), 100, 100, "cpu", False) == 2048


def test_memory_is_read_from_the_machine_and_its_control_group(monkeypatch, tmp_path) -> None:
    used, free, whole = memory.memory_of(torch.device("cpu"))
    assert 0 < used < whole
    assert 0 < free <= whole <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr(memory, "CONTROL_GROUP", tmp_path)
    (tmp_path / "memory.max").write_text(f"{whole // 2}\n")
    (tmp_path / "memory.current").write_text(f"{whole // 2 - 4096}\n")
    assert memory.memory_of(torch.device("cpu"))[1:] == (4096, whole // 2)
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.memory_of(torch.device("cpu"))[2] == os.sysconf("SC_PHYS_PAGES") * os.sysconf(
        "SC_PAGE_SIZE"
    )


def test_what_was_asked_for_is_kept(llama, training, tmp_path) -> None:
    asked = {"micro_batch_tokens": 77, "packing": False, "gradient_checkpointing": True}
    chosen = one(Resolved, begun(llama, training, tmp_path, **asked)).spec.hyperparameters
    assert {name: getattr(chosen, name) for name in asked} == asked


def test_a_model_without_checkpointing_refuses_it_by_name(llama, training, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(type(llama.model), "supports_gradient_checkpointing", False)
    with pytest.raises(SpecError, match=r"hyperparameters\.gradient_checkpointing"):
        begun(llama, training, tmp_path, gradient_checkpointing=True)


@pytest.mark.parametrize("type", ["supervised", "dpo"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointed_blocks_give_the_same_run_bit_for_bit(llama, tmp_path, type, dropout) -> None:
    rows = chat_rows() if type == "supervised" else preference_rows()
    training = write_rows(tmp_path / "rows.jsonl", rows)
    runs = []
    for checkpointing in (False, True):
        spec = spec_for(type=type, adapter={"dropout": dropout}, gradient_checkpointing=checkpointing)
        norm, times = llama.model.model.layers[0].input_layernorm, []
        handle = norm.register_forward_hook(lambda *_, times=times: times.append(torch.is_grad_enabled()))
        steps = losses(train(spec, llama, training, None, tmp_path / str(checkpointing)))
        handle.remove()
        runs.append((steps, sum(times)))
    (plain, once), (checkpointed, twice) = runs
    assert checkpointed == plain
    assert twice > 1.5 * once  # what is computed with gradients: each block a second time
    assert not any(getattr(module, "gradient_checkpointing", False) for module in llama.model.modules())


# --- out of memory -------------------------------------------------------------------------------------


class Device:
    """Holds this many tokens of a pass and no more: beyond it the base's first norm has no memory."""

    def __init__(self, base: Base, most: int) -> None:
        self.most, self.refusals = most, 0
        base.model.model.layers[0].input_layernorm.register_forward_pre_hook(self)

    def __call__(self, module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        if inputs[0].shape[:-1].numel() > self.most and torch.is_grad_enabled():
            self.refusals += 1
            raise torch.OutOfMemoryError("the device is full")


SETTINGS = {"micro_batch_tokens": 4096, "micro_batch_size": 4, "gradient_checkpointing": False}


@pytest.mark.parametrize("packing", [False, True])
def test_a_step_that_runs_out_of_memory_begins_again_with_less(
    base_folders, training, tmp_path, packing
) -> None:
    spec = spec_for(packing=packing, adapter={"dropout": 0.0}, **SETTINGS)
    base = load_base(base_folders["llama"], name="tiny")
    whole = losses(train(spec, base, training, None, tmp_path / "whole"))
    device = Device(base, 40)
    progress = list(train(spec, base, training, None, tmp_path / "starved"))
    warnings = [p for p in progress if isinstance(p, Note) and "ran out of memory" in p.message]
    assert device.refusals == len(warnings) > 0
    assert losses(progress) == pytest.approx(whole, rel=1e-5)
    assert [p.step for p in progress if isinstance(p, Step)] == [1, 2, 3, 4, 5, 6]
    assert one(Finished, progress).certificate["passed"]


def test_smaller_passes_survive_a_resume(base_folders, training, tmp_path) -> None:
    spec, base = spec_for(**SETTINGS), load_base(base_folders["llama"], name="tiny")
    Device(base, 40)
    run = train(spec, base, training, None, tmp_path)
    first = []
    for progress in run:
        first.append(progress)
        if isinstance(progress, Saved):
            run.close()
            break
    spec = one(Resolved, first).spec
    again = list(train(spec, base, training, None, tmp_path, resume=first[-1].folder))
    assert not [p for p in again if isinstance(p, Note) and "ran out of memory" in p.message]


def test_an_example_that_does_not_fit_alone_names_the_remedy(base_folders, training, tmp_path) -> None:
    base = load_base(base_folders["llama"], name="tiny")
    Device(base, 3)
    for settings, remedy in ((SETTINGS, r"Step 1 .*hyperparameters\.context_length"), ({}, r"adapter\.rank")):
        with pytest.raises(TrainingError, match=remedy) as caught:
            list(train(spec_for(**settings), base, training, None, tmp_path))
        assert caught.value.code == "out_of_memory"


# --- against the measured peak -------------------------------------------------------------------------

MEASURE = """
import json, sys
from pathlib import Path
import torch
from olora_core.bases.loading import load_base
from olora_core.specs import TrainSpec
from olora_core.progress import Note, Step
from olora_core.training.train import train

torch.set_num_threads(2)
case = json.load(sys.stdin)
base = load_base(Path(case["base"]), name="tiny")
run = train(TrainSpec.model_validate(case["spec"]), base, Path(case["training"]), None, Path(case["folder"]))
for progress in run:
    if isinstance(progress, Note) and "peak_bytes" in (progress.data or {}):
        estimated = progress.data
    if isinstance(progress, Step):
        measured = progress.memory_bytes
    if isinstance(progress, Step) and progress.step == 2:
        break
used = estimated["used_bytes"]
print(json.dumps({"estimated": estimated["peak_bytes"] - used, "measured": measured - used}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_estimate_is_within_a_quarter_of_the_measured_peak(tmp_path: Path, dtype: str) -> None:
    """What training adds to what is in use before it; in a process of its own, whose peak is its own."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    spec = spec_for(batch_size=30, micro_batch_size=30, micro_batch_tokens=4000, dtype=dtype, n_epochs=3)
    answer = {"role": "assistant", "content": "xyz" * 25}
    rows = [{"messages": [{"role": "user", "content": "ab" * 12}, answer]} for _ in range(60)]
    case = {
        "base": str(save_base(tmp_path / "base", model)),
        "spec": spec.model_dump(mode="json"),
        "training": str(write_rows(tmp_path / "training.jsonl", rows)),
        "folder": str(tmp_path / "run"),
    }
    done = subprocess.run(
        [sys.executable, "-c", MEASURE],
        input=json.dumps(case),
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
    )
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["measured"] > 100 * 2**20  # far above what the libraries' own buffers could hide
    assert figures["estimated"] == pytest.approx(figures["measured"], rel=0.25)
