"""What every method promises of a whole run, on `nn.Linear` and on Conv1D, in fp32 and in bf16."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from olora_core.bases.loading import Base, load_base
from olora_core.methods import METHODS
from olora_core.progress import Finished, Progress
from olora_core.specs import TrainSpec
from olora_core.training.train import train

from ..runs import ROWS, chat_rows, losses, one, spec_for, write_rows

# PEFT looks at a property that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

BASES = ("llama", "llama-bf16", "gpt2", "gpt2-bf16")
STEPS = 12
RATES = {"adalora": 0.05, "sora": 0.02}
"""Where twelve steps at 5e-3 teach too little."""
ADAPTERS: dict[str, dict[str, Any]] = {
    # The spectrum of a pass depends on its tokens' number, and dropout on their order.
    "ba_lora": {"lambda_spectrum": 0.0},
    "melora": {"dropout": 0.0},
    "mora": {"dropout": 0.0},
    "sora": {"threshold": 1e-3},
    "xgblora": {"steps_per_round": 4},
    "prilora": {"prune_every": 5},
}


def run_spec(method: str, *, dtype: str = "float32", **settings: Any) -> TrainSpec:
    """Every step sees all rows, so that losses of two steps can be compared."""
    chosen = {"n_epochs": STEPS, "batch_size": ROWS, "micro_batch_size": 4, "packing": True, "dtype": dtype}
    rate = RATES.get(method, 5e-3)
    adapter = ADAPTERS.get(method)
    return spec_for(method, adapter=adapter, learning_rate=rate, **chosen | settings)


@pytest.fixture(scope="module", params=BASES)
def folder(request: pytest.FixtureRequest, base_folders: dict[str, Path]) -> Path:
    return base_folders[request.param]


@pytest.fixture(scope="module")
def base(folder: Path) -> Base:
    """One for all runs: each leaves it as it was."""
    dtype = torch.bfloat16 if folder.name.endswith("bf16") else torch.float32
    return load_base(folder, name="tiny", dtype=dtype)


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "training.jsonl", chat_rows())


@pytest.mark.parametrize("method", METHODS)
def test_a_run_learns_leaves_the_base_alone_and_exports_what_it_trained(
    base: Base, folder: Path, training: Path, tmp_path: Path, token_rows: Tensor, method: str
) -> None:
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    dtype = "bfloat16" if base.dtype == torch.bfloat16 else "float32"
    progress: list[Progress] = []
    for said in train(run_spec(method, dtype=dtype), base, training, None, tmp_path):
        progress.append(said)
        if isinstance(said, Finished):
            logits = logits_of(base.model, token_rows)
    seen = losses(progress)
    assert len(seen) == STEPS
    assert seen[-1] < seen[0] - 0.05
    after = base.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    finished = one(Finished, progress)
    assert finished.certificate["passed"]
    fresh = AutoModelForCausalLM.from_pretrained(folder, dtype=base.dtype)
    theirs = logits_of(PeftModel.from_pretrained(fresh, finished.folder), token_rows)
    # Both round each layer's output, fp32 to 1e-7 of it and bf16 to 4e-3.
    bound = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[base.dtype] * float(logits.abs().max())
    assert float((theirs - logits).abs().max()) <= bound


@pytest.mark.parametrize("folder", ["llama", "gpt2"], indirect=True)
@pytest.mark.parametrize("method", METHODS)
def test_how_a_batch_is_cut_into_passes_changes_nothing(
    base: Base, training: Path, tmp_path: Path, method: str
) -> None:
    cuts = {"packing": False}, {"micro_batch_size": 1}, {"micro_batch_size": ROWS}
    expected, *others = (
        losses(train(run_spec(method, max_steps=6, **cut), base, training, None, tmp_path / str(cut)))
        for cut in ({}, *cuts)
    )
    for seen in others:
        assert seen == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def logits_of(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    return model(tokens, use_cache=False).logits.float()
