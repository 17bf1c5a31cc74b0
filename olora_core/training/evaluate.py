"""How good a model is on examples it does not train on.

A run measures on its way: a glance at a few rows, and the whole validation file.
"""

import math
from collections.abc import Generator

import numpy as np
import torch

from ..bases.loading import Base
from ..bases.passes import evaluating
from ..data.batches import MicroBatch, micro_batches
from ..data.examples import Examples
from ..devices import SINGLE, Devices
from ..layers.adapter import adapter_tensors
from ..progress import Evaluated, Phase, result_of
from .losses import Loss, task_loss
from .run import Run, not_finite

ROWS_AT_ONCE = 256
"""Examples that are cut into passes together."""
QUICK_EVALUATIONS = 20
"""How often a run looks at the first validation rows."""


def evaluate(
    base: Base,
    examples: Examples,
    *,
    size: int,
    tokens: int,
    packing: bool,
    loss_of_batch: Loss = task_loss,
    devices: Devices = SINGLE,
) -> Generator[Phase, None, tuple[float, float]]:
    """Mean loss (nats per trained token, or per pair) and accuracy over all examples; yields progress.

    The micro-batches are dealt over the devices, and the figures are those of one device.
    """

    def judged(batch: MicroBatch) -> list[float]:
        # Set for each batch, since whoever drives a generator may do other things between two of them.
        with evaluating(base.model), torch.no_grad():
            loss = loss_of_batch(base.model, batch.to(base.device), base.passes)
        return [loss.total.item(), float(loss.correct), float(loss.weight)]

    done = 0
    figures: list[list[float]] = []  # sum of losses, hits, weight of each micro-batch; zeros if another's
    for start in range(0, len(examples), ROWS_AT_ONCE):
        rows = np.arange(start, min(start + ROWS_AT_ONCE, len(examples)))
        pad = base.tokenizer.pad_token_id or 0
        batches = micro_batches(examples, rows, size=size, tokens=tokens, packing=packing, pad_token=pad)
        told = [[0.0] * 3 for _ in batches]
        for position, counts in devices.assign([batch.tokens for batch in batches], in_step=base.shards > 1):
            if base.shards > 1:
                devices.barrier()  # every pass over the base takes all devices
            seen = judged(batches[position])
            if counts:
                told[position] = seen
                done += len(batches[position].lengths) // examples.sides * devices.count
            yield Phase("evaluating", min(done, len(examples)), len(examples))
        figures += told
    devices.barrier()
    sums = devices.sum(torch.tensor(figures, dtype=torch.float64)).tolist()
    total, correct, weight = (sum(column) for column in zip(*sums, strict=True))
    return total / weight, correct / weight


def quick_evaluation(run: Run) -> tuple[float, float] | None:
    """Loss and accuracy over the first validation rows, at about twenty steps of a run."""
    every = max(1, run.total_steps // QUICK_EVALUATIONS)
    if run.quick_examples is None or run.step % every:
        return None
    seen = result_of(evaluation(run, run.quick_examples))
    if not math.isfinite(seen[0]):
        raise not_finite(run, f"The validation loss after step {run.step} is {seen[0]}.")
    run.quick_evaluations.append((run.step, *seen))
    return seen


def evaluate_fully(run: Run) -> Generator[Phase | Evaluated, None, None]:
    """The whole validation file, if there is one."""
    run.evaluated_at = run.step
    if run.data.validation is not None:
        loss, accuracy = yield from evaluation(run, run.data.validation)
        if not math.isfinite(loss):
            raise not_finite(run, f"The validation loss after step {run.step} is {loss}.")
        evaluated = Evaluated(run.step, loss, accuracy)
        run.evaluations.append(evaluated)
        if run.best is evaluated:
            now = adapter_tensors(run.adapters)
            run.best_tensors = {name: tensor.to("cpu", copy=True) for name, tensor in now.items()}
        yield evaluated


def evaluation(run: Run, examples: Examples) -> Generator[Phase, None, tuple[float, float]]:
    return evaluate(
        run.base,
        examples,
        size=run.hyperparameters.micro_batch_size,
        tokens=run.micro_batch_tokens,
        packing=run.hyperparameters.packing,
        loss_of_batch=run.measure,
        devices=run.devices,
    )
