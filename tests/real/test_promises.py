"""What is promised of every run, on a real model of 135 million parameters, in fp32 and in bf16."""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from examples import quickstart_real
from olora_core.bases.loading import Base, load_base
from olora_core.progress import Step
from olora_core.training.train import train
from tests.rows import write_rows

from .runs import ROWS, STEPS, Run, logits_of, run_of, spec_for, tokens_of

# PEFT looks at a property that transformers has deprecated, and torchao is loaded without its kernels.
pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.timeout(900)]

LN_2 = math.log(2)
ULP = float(np.spacing(np.float32(LN_2)))
ORDERS, MERGED = 2, 4
"""Times the dtype's rounding: two orders of the same sums round twice, and merging rounds the weights too."""
Say = Callable[[str], None]


@pytest.fixture(scope="module")
def rounding(base: Base, folder: Path, run: Run) -> float:
    """What computing in its dtype does to the base's logits, against the same weights in float64: a norm."""
    wide = AutoModelForCausalLM.from_pretrained(folder, dtype=base.dtype).double()
    return float((logits_of(wide, tokens_of(base)) - run.bare).norm())


def apart(theirs: Tensor, run: Run) -> float:
    """How far logits are from the trained model's: a norm, as that of the rounding."""
    return float((theirs - run.trained).norm())


def test_it_starts_at_the_base_bit_for_bit(run: Run) -> None:
    assert torch.equal(run.at_start, run.bare)
    assert len(run.bare.unique()) > 1000


def test_it_learns(run: Run, say: Say) -> None:
    say(f"loss {run.losses[0]:.3f} to {run.losses[-1]:.3f} in {STEPS} steps")
    assert len(run.losses) == STEPS
    assert run.losses[-1] < run.losses[0] - 0.1


def test_it_is_certified(run: Run, say: Say) -> None:
    certificate = run.certificate
    say(f"largest difference {certificate['max_abs_logit_diff']:.1e} of {certificate['bound']:.1e} allowed")
    assert certificate["passed"] is True


def test_peft_loads_the_adapter_and_gives_the_trained_logits(
    base: Base, folder: Path, run: Run, rounding: float, say: Say
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=base.dtype)
    theirs = logits_of(PeftModel.from_pretrained(plain, run.folder), tokens_of(base))
    changed = float((run.trained - run.bare).norm())
    say(
        f"apart by {apart(theirs, run):.2g}; its dtype rounds by {rounding:.2g}, training moved {changed:.0f}"
    )
    assert apart(theirs, run) <= ORDERS * rounding < changed


def test_with_the_adapter_off_it_is_the_base_bit_for_bit(run: Run) -> None:
    assert torch.equal(run.turned_off, run.bare)
    assert not torch.equal(run.trained, run.bare)


def test_it_resumes_from_its_middle_to_the_same_bytes(
    base: Base, dtype: str, training: Path, run: Run, tmp_path: Path, say: Say
) -> None:
    rest = run_of(base, spec_for(dtype), training, tmp_path, resume=run.checkpoint)
    say(f"{len(rest.steps)} of {STEPS} steps again")
    assert len(rest.steps) == STEPS // 2
    assert rest.losses == run.losses[STEPS // 2 :]
    for file in ("adapter_model.safetensors", "native/adapter.safetensors"):
        assert digest(rest.folder / file) == digest(run.folder / file)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_merged_weights_are_the_bases_plus_the_update(
    base: Base, dtype: str, training: Path, rounding: float, tmp_path: Path, say: Say
) -> None:
    spec = spec_for(dtype, adapter={"export": "merged"}, n_epochs=2)
    run = run_of(base, spec, training, tmp_path)
    assert run.certificate["passed"] is True
    native = load_file(run.folder / "native" / "adapter.safetensors")
    before, after = dict(base.model.named_parameters()), load_file(run.folder / "model.safetensors")
    adapter = json.loads((run.folder / "manifest.json").read_text())["spec"]["resolved"]["adapter"]
    scale, worst = adapter["alpha"] / adapter["rank"], 0.0
    for site in sorted({name.rpartition(".")[0] for name in native}):
        A, B, A0, B0 = (native[f"{site}.{name}"].double() for name in ("A", "B", "A0", "B0"))
        expected = before[f"{site}.weight"].double() + scale * (B @ A - B0 @ A0)
        difference = (after[f"{site}.weight"].double() - expected).abs()
        worst = max(worst, float(difference.max() / expected.abs().max()))
    merged = AutoModelForCausalLM.from_pretrained(run.folder, dtype=base.dtype)
    theirs = logits_of(merged, tokens_of(base))
    say(f"weights apart by {worst:.1e} of the largest, logits by {apart(theirs, run):.2g}")
    assert worst <= max(torch.finfo(d).eps for d in (base.dtype, merged.dtype))
    assert apart(theirs, run) <= MERGED * rounding


def test_dpo_starts_at_the_logarithm_of_2(base: Base, dtype: str, tmp_path: Path, say: Say) -> None:
    rows = [json.loads(line)["messages"] for line in quickstart_real.TRAINING.read_text().splitlines()]
    pairs = (
        {"input": {"messages": row[:2]}, "preferred_output": row[2:], "non_preferred_output": other[2:]}
        for row, other in zip(rows[:ROWS], rows[ROWS:], strict=False)
    )
    training = write_rows(tmp_path / "pairs.jsonl", pairs)
    updates = train(spec_for(dtype, type="dpo"), base, training, None, tmp_path / "run")
    first = next(update for update in updates if isinstance(update, Step))
    updates.close()
    say(f"first loss {first.loss:.9f}")
    assert abs(first.loss - LN_2) <= ULP
    assert first.grad_norm > 0


def test_the_base_was_never_written(base: Base, dtype: str, folder: Path, run: Run, say: Say) -> None:
    """After all runs above, on its files and in memory."""
    files = load_file(folder / "model.safetensors")
    parameters = dict(base.model.named_parameters())
    assert files.keys() == parameters.keys()
    assert all(torch.equal(parameters[name], files[name].to(base.dtype)) for name in files)
    say(f"{len(files)} tensors, {sum(map(torch.numel, files.values())):,} numbers")


@pytest.mark.parametrize("kind", ["int8", "torchao-int8"])
def test_an_int8_base_is_trained_certified_and_left_alone(
    folder: Path, training: Path, tmp_path: Path, kind: str, say: Say
) -> None:
    base = load_base(folder, name="real", dtype=torch.float32, quantization=kind)
    run = run_of(base, spec_for("float32", quantization=kind), training, tmp_path)
    say(f"loss {run.losses[0]:.3f} to {run.losses[-1]:.3f}")
    assert torch.equal(run.at_start, run.bare)
    assert torch.equal(run.turned_off, run.bare)
    assert run.losses[-1] < run.losses[0] - 0.1
    assert run.certificate["passed"] is True
