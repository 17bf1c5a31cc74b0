"""Short runs on the real model, and what is seen of them."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from olora_core.bases.loading import Base
from olora_core.layers.adapter import adapters_off
from olora_core.progress import Finished, Resolved, Saved, Step
from olora_core.specs import TrainSpec, read_spec
from olora_core.training.train import train

ROWS, STEPS = 8, 4
"""Rows of a run, all of which are in each of its steps, so that losses can be compared."""
NEVER = 86_400.0


@dataclass
class Run:
    """What a run yielded, and (3, 24, vocabulary) logits in fp32: before it, in it, and at its end."""

    bare: Tensor
    at_start: Tensor = field(default_factory=lambda: torch.empty(0))
    trained: Tensor = field(default_factory=lambda: torch.empty(0))
    turned_off: Tensor = field(default_factory=lambda: torch.empty(0))
    steps: list[Step] = field(default_factory=list)
    checkpoint: Path | None = None
    finished: Finished | None = None

    @property
    def losses(self) -> list[float]:
        return [step.loss for step in self.steps]

    @property
    def folder(self) -> Path:
        assert self.finished is not None
        return self.finished.folder

    @property
    def certificate(self) -> dict[str, Any]:
        assert self.finished is not None
        return self.finished.certificate


def spec_for(
    dtype: str, *, type: str = "supervised", adapter: dict[str, Any] | None = None, **changes: Any
) -> TrainSpec:
    """OLoRA with its defaults for STEPS epochs of one step each."""
    chosen = {"n_epochs": STEPS, "batch_size": ROWS, "samples": 0, "dtype": dtype, "warmup_ratio": 0.0}
    return read_spec(
        model="real",
        type=type,
        hyperparameters=chosen | changes,
        adapter={"method": "olora"} | (adapter or {}),
        seed=7,
    )


def tokens_of(base: Base) -> Tensor:
    """(3, 24) token ids, always the same."""
    return torch.randint(3, base.embedded_tokens, (3, 24), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits_of(model: Any, tokens: Tensor) -> Tensor:
    """(3, 24, vocabulary), in fp32"""
    return model(tokens, use_cache=False).logits.float()


def run_of(base: Base, spec: TrainSpec, training: Path, folder: Path, *, resume: Path | None = None) -> Run:
    """A whole run, and the checkpoint of its middle: one follows each epoch, and so each step."""
    tokens = tokens_of(base)
    run = Run(logits_of(base.model, tokens))
    for update in train(spec, base, training, None, folder, resume=resume, checkpoint_seconds=NEVER):
        match update:
            case Resolved():
                run.at_start = logits_of(base.model, tokens)
            case Step():
                run.steps.append(update)
            case Saved(step=step) if step == STEPS // 2:  # the run itself keeps its newest two
                run.checkpoint = shutil.copytree(update.folder, folder / "middle" / update.folder.name)
            case Finished():
                run.finished, run.trained = update, logits_of(base.model, tokens)
                with adapters_off(base.model):
                    run.turned_off = logits_of(base.model, tokens)
    return run
