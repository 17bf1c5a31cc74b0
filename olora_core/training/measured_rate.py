"""The learning rate that a run has by default, measured before its first step.

A few steps of Adam are made at a constant rate, on the first batches and from the run's own start, and then
the loss is measured on the rows that come next. This is repeated with rates a factor 2 apart, until the best
one has a worse one on either side. The run's peak rate is `PEAK` times the best, which the vertex of a
parabola through these three losses gives. Every trial begins at the run's start, and so does the run.

So few steps cannot tell how far the run has to go: where little has to be learned the measured rate is too
high, where much has to be, too low. The table's rate errs elsewhere, as widely. The run takes their geometric
mean, which is nearer to the best rate than either.

Why Adam's own steps, and not the largest eigenvalue of the Hessian: Adam moves every parameter by about the
rate, whatever the gradient's size, so that its best rate does not follow the curvature from one method to
another; docs/methods.md has both, measured against sweeps.
"""

import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..data.batches import epoch_order
from ..data.examples import Examples
from ..layers.adapter import adapter_tensors, load_adapter_tensors
from ..progress import Note, Phase, result_of
from ..specs import with_learning_rate
from .checkpoint import learning_rate_of
from .evaluate import evaluation
from .losses import set_training
from .run import Run
from .step import accumulate_within_memory

STEPS = 4
"""Adam's steps in a trial."""
MOST_ROWS = 8
"""Examples in each of these steps, if the batch has more."""
JUDGED_ROWS = 24
"""Examples on which a trial's loss is measured."""
MOST_TRIALS = 10
FEWEST_RUN_STEPS = 30
"""Optimizer steps of a run that is worth the measurement, which costs about as much as 20."""
PEAK = 0.75
"""A run's peak rate, relative to the best constant rate of so few steps."""


@dataclass(frozen=True)
class MeasuredRate:
    """A measured peak rate, and the trials that it comes from."""

    rate: float
    trials: list[tuple[float, float]]
    """(rate, loss in nats), by rising rate; the loss is infinite where it was not finite."""

    @property
    def sentence(self) -> str:
        trials = ", ".join(f"{loss:.3f} at {rate:.2g}" for rate, loss in self.trials)
        return f"after {STEPS} steps the loss on {JUDGED_ROWS} other examples was {trials}"


def settle_rate(run: Run, resume: Path | None) -> Generator[Phase | Note, None, dict[str, str]]:
    """Gives a run that has not begun its peak rate, unless the job asks for a number.

    It is the geometric mean of the table's and the measured one. A run that resumes takes its checkpoint's:
    measured elsewhere it might be another. Returns the reason.
    """
    asked = run.asked.hyperparameters.learning_rate
    if asked not in ("auto", "table"):
        return {}
    factor = run.hyperparameters.learning_rate_multiplier
    if resume is not None:
        peak = learning_rate_of(resume, run.schedule, run.total_steps, factor)
        if peak is None:
            return {}
        run.spec = with_learning_rate(run.spec, peak)
        return {"learning_rate": f"learning_rate = {peak:g} (as in the checkpoint)"}
    if asked == "table" or not is_measurable(run):
        return {}
    table = run.hyperparameters.learning_rate / factor
    measured = yield from measure_rate(run)
    mean = float(f"{math.sqrt(table * measured.rate):.2g}")
    run.spec = with_learning_rate(run.spec, mean * factor)
    times = "" if factor == 1 else f"{factor:g} times {mean:g}, "
    peak = run.hyperparameters.learning_rate
    between = f"between the table's {table:g} and the measured {measured.rate:g}; {measured.sentence}"
    return {"learning_rate": f"learning_rate = {peak:g} (auto: {times}{between})"}


def is_measurable(run: Run) -> bool:
    """Whether the run is long enough for a measurement, and has rows enough."""
    rows = STEPS * rows_per_step(run) + JUDGED_ROWS
    return run.total_steps >= FEWEST_RUN_STEPS and len(run.data.training) >= rows


def rows_per_step(run: Run) -> int:
    return min(run.hyperparameters.batch_size, MOST_ROWS)


def measure_rate(run: Run) -> Generator[Phase | Note, None, MeasuredRate]:
    """Measures the peak rate of a run that has not begun, and leaves the run as it was.

    Every process of a run on several devices calls this and gets the same result.
    """
    size = rows_per_step(run)
    order = epoch_order(len(run.data.training), seed=run.spec.seed, epoch=0)
    batches = [order[step * size : (step + 1) * size] for step in range(STEPS)]
    judged = run.data.training.select(order[STEPS * size : STEPS * size + JUDGED_ROWS])
    method = run.method.state_dict()
    start = {name: tensor.to("cpu", copy=True) for name, tensor in adapter_tensors(run.adapters).items()}
    center = run.hyperparameters.learning_rate / PEAK
    losses: dict[int, float] = {}
    while (power := next_trial(losses)) is not None:
        yield Phase("measuring", len(losses), MOST_TRIALS)
        losses[power] = yield from trial(run, center * 2.0**power, batches, judged)
        load_adapter_tensors(run.adapters, start)
        run.method.load_state_dict(method)
    yield Phase("measuring", MOST_TRIALS, MOST_TRIALS)
    trials = [(center * 2.0**power, losses[power]) for power in sorted(losses)]
    return MeasuredRate(float(f"{PEAK * center * 2.0 ** best_power(losses):.2g}"), trials)


def next_trial(losses: Mapping[int, float]) -> int | None:
    """The power of two to try next; None once the best has a worse one on either side, or after enough."""
    if len(losses) == MOST_TRIALS:
        return None
    best = min(losses, key=lambda power: (losses[power], power), default=0)
    return next((power for power in (best, best - 1, best + 1) if power not in losses), None)


def best_power(losses: Mapping[int, float]) -> float:
    """Where the loss is lowest: the vertex of the parabola through the best trial and its neighbours."""
    best = min(losses, key=lambda power: (losses[power], power))
    below, above = losses.get(best - 1, math.inf), losses.get(best + 1, math.inf)
    curvature = below - 2 * losses[best] + above
    if not (math.isfinite(curvature) and curvature > 0):
        return best
    return best + (below - above) / (2 * curvature)


def trial(run: Run, rate: float, batches: list[np.ndarray], judged: Examples) -> Generator[Note, None, float]:
    """The loss on `judged`, in nats, after a step of Adam at this rate on each of the batches.

    The adapters are left changed. Infinite if it is not finite.
    """
    optimizer = torch.optim.AdamW(
        [
            {"params": group["params"], "lr": group.get("lr_peak", rate) * group["lr_multiplier"]}
            for group in run.optimizer.param_groups
        ],
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        fused=True,
    )
    for step, rows in enumerate(batches, 1):
        set_training(run.base.model, run.spec)
        sums, _ = yield from accumulate_within_memory(run, step, rows)
        run.devices.sum_gradients(run.parameters, sums)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.method.on_step_retry()
    loss, _ = result_of(evaluation(run, judged))
    return loss if math.isfinite(loss) else math.inf
