"""The loss and accuracy of a model on examples that it is not trained on.

A run has two kinds of evaluation: quick ones over the first rows of the validation file, and full ones.
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
"""Number of examples that are cut into forward passes together."""
QUICK_EVALUATIONS = 20
"""Number of quick evaluations in a run, at most about."""
QUICK_SHARE = 0.2
"""What quick evaluations may add to the time of a run's steps; a forward pass is a third of a step's work."""


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

    With weights, the loss is the tokens' weighted mean; the accuracy counts every trained token once.

    `size` and `tokens` limit a forward pass. The micro-batches are shared out over the devices; the result is
    the same as on one.
    """

    def sums_of(batch: MicroBatch) -> list[float]:
        # Eval mode is set for each batch, since the caller may do other things between two of them.
        with evaluating(base.model), torch.no_grad():
            loss = loss_of_batch(base.model, batch.to(base.device), base.passes)
        return [loss.total.item(), float(loss.correct), float(loss.weight), float(loss.count)]

    done = 0
    # (loss, correct, weight, count) of each micro-batch, in order; zeros where another process has it.
    # Summing the rows over the processes adds zeros only, so the total has the same bits on any number of
    # devices.
    sums: list[list[float]] = []
    for start in range(0, len(examples), ROWS_AT_ONCE):
        rows = np.arange(start, min(start + ROWS_AT_ONCE, len(examples)))
        batches = micro_batches(
            examples, rows, size=size, tokens=tokens, packing=packing, pad_token=base.padding
        )
        own = [[0.0] * 4 for _ in batches]
        for position, counts in devices.assign([batch.tokens for batch in batches], in_step=base.shards > 1):
            if base.shards > 1:
                devices.barrier()  # every pass gathers the base's shards from all processes
            result = sums_of(batches[position])
            if counts:
                own[position] = result
                done += len(batches[position].lengths) // examples.rows_per_example * devices.count
            yield Phase("evaluating", min(done, len(examples)), len(examples))
        sums += own
    devices.barrier()
    everywhere = devices.sum(torch.tensor(sums, dtype=torch.float64)).tolist()
    total, correct, weight, count = (sum(column) for column in zip(*everywhere, strict=True))
    return total / weight, correct / count


def quick_interval(run: Run, rows: int) -> int:
    """Steps between two quick evaluations of `rows` rows."""
    affordable = math.ceil(rows / (3 * QUICK_SHARE * run.hyperparameters.batch_size))
    return max(affordable, run.total_steps // QUICK_EVALUATIONS)


def quick_evaluation(run: Run) -> tuple[float, float] | None:
    """Loss and accuracy over the first validation rows; None at most steps, or without a validation file."""
    if run.quick_examples is None or run.step % quick_interval(run, len(run.quick_examples)):
        return None
    loss, accuracy = result_of(evaluation(run, run.quick_examples))
    if not math.isfinite(loss):
        raise not_finite(run, f"The validation loss after step {run.step} is {loss}.")
    run.quick_evaluations.append((run.step, loss, accuracy))
    return loss, accuracy


def evaluate_fully(run: Run) -> Generator[Phase | Evaluated, None, None]:
    """Evaluates the whole validation file, if there is one; keeps the adapter if it is the best so far."""
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
    """`evaluate` with the run's base, loss and limits of a forward pass."""
    return evaluate(
        run.base,
        examples,
        size=run.hyperparameters.micro_batch_size,
        tokens=run.micro_batch_tokens,
        packing=run.hyperparameters.packing,
        loss_of_batch=run.measure,
        devices=run.devices,
    )
