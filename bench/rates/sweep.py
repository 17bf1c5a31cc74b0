"""The sweep of one triple (base, task, method): the loss at several rates, and what its start foretells."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from olora_core.bases.loading import Base
from olora_core.bases.sites import target_sites
from olora_core.devices import SINGLE
from olora_core.errors import TrainingError
from olora_core.progress import result_of
from olora_core.specs import TrainSpec, read_spec, resolve
from olora_core.training.data import Data
from olora_core.training.measured_rate import MeasuredRate, measure_rate
from olora_core.training.resume import Checkpoints
from olora_core.training.run import Run, restored_afterwards, run_facts, start
from olora_core.training.step import accumulate
from olora_core.training.train import steps

STEP = 2.0
"""Ratio of two neighbouring rates. The loss rises so much faster above the best rate than below it that
a parabola over half decades would miss the best one by far."""
BATCH = 4


@dataclass(frozen=True)
class Kind:
    """What the runs of a sweep have in common beside their method."""

    type: str = "supervised"
    quantization: str = "none"


def train_spec(
    adapter: dict[str, Any], kind: Kind = Kind(), seed: int = 0, **hyperparameters: Any
) -> TrainSpec:
    fixed = {"batch_size": BATCH, "samples": 0, "dtype": "float32", "quantization": kind.quantization}
    return read_spec(
        model="base", type=kind.type, adapter=adapter, hyperparameters=fixed | hyperparameters, seed=seed
    )


@contextmanager
def begun(spec: TrainSpec, base: Base, data: Data) -> Iterator[Run]:
    """A run before its first step."""
    resolved, _ = resolve(spec, run_facts(base, data, SINGLE))
    with restored_afterwards(base):
        sites = target_sites(base.model, spec.adapter.target_modules)
        run, _ = result_of(start(spec, resolved, base, data, sites, SINGLE))
        run.quick_examples = None
        yield run


def final_loss(
    adapter: dict[str, Any], kind: Kind, base: Base, data: Data, rate: float, length: int, seed: int = 0
) -> float:
    """Validation loss after a whole run at this peak rate, in nats; infinite if it diverged."""
    spec = train_spec(adapter, kind, seed, learning_rate=rate, max_steps=length)
    with begun(spec, base, data) as run:
        nowhere = Checkpoints(save=lambda run: None, seconds=math.inf, follow_evaluations=False)
        try:
            for _ in steps(run, nowhere, lambda run: run.step == run.total_steps):
                pass
        except TrainingError:
            return math.inf
        return run.evaluations[-1].loss


def sweep(measure: Callable[[float], float], first: float) -> dict[float, float]:
    """Losses at `first` and at rates a factor 2 apart, until the best rate has a worse one on each side."""
    losses: dict[int, float] = {}
    for power in (0, -1, 1):
        losses[power] = measure(first * STEP**power)
    while (best := min(losses, key=losses.__getitem__)) in (min(losses), max(losses)) and len(losses) < 8:
        power = best - 1 if best == min(losses) else best + 1
        losses[power] = measure(first * STEP**power)
    return {first * STEP**power: losses[power] for power in sorted(losses)}


def measured(adapter: dict[str, Any], kind: Kind, base: Base, data: Data) -> MeasuredRate:
    """What a run with learning_rate "auto" measures."""
    with begun(train_spec(adapter, kind), base, data) as run:
        return result_of(measure_rate(run))


def curvature(adapter: dict[str, Any], kind: Kind, base: Base, data: Data) -> float:
    """The largest eigenvalue of the loss's Hessian in the adapter's coordinates, at the run's start."""
    with begun(train_spec(adapter, kind), base, data) as run:
        rows = np.concatenate([run.rows(step) for step in range(1, 5)])
        return largest_eigenvalue(run, rows, [p.detach().clone() for p in run.parameters])


@torch.no_grad()
def put(run: Run, values: list[Tensor]) -> None:
    for parameter, value in zip(run.parameters, values, strict=True):
        parameter.copy_(value)


def gradient(run: Run, rows: np.ndarray) -> list[Tensor]:
    """Of the mean loss over these rows."""
    run.base.model.eval()
    with run.random:
        accumulate(run, rows)
    found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in run.parameters]
    run.optimizer.zero_grad(set_to_none=True)
    return found


def largest_eigenvalue(run: Run, rows: np.ndarray, at: list[Tensor], iterations: int = 6) -> float:
    """By power iterations; Hessian times vector is a central difference of gradients."""
    generator = torch.Generator().manual_seed(0)
    vector = [torch.randn(p.shape, generator=generator) for p in at]
    value = 0.0
    for _ in range(iterations):
        norm = math.sqrt(sum(v.square().sum().item() for v in vector))
        vector = [v / norm for v in vector]
        small = 1e-2 * math.sqrt(sum(p.square().sum().item() for p in at)) / 10
        sides = []
        for sign in (1, -1):
            put(run, [p + sign * small * v for p, v in zip(at, vector, strict=True)])
            sides.append(gradient(run, rows))
        product = [(a - b) / (2 * small) for a, b in zip(*sides, strict=True)]
        value = sum((v * h).sum().item() for v, h in zip(vector, product, strict=True))
        vector = product
    put(run, at)
    return value
