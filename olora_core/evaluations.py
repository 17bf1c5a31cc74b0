"""What a run measures on its way: a glance at a few rows, and the whole validation file."""

import math
from collections.abc import Generator

from .evaluate import evaluate
from .examples import Examples
from .layers.adapter import adapter_tensors
from .progress import Evaluated, Phase, result_of
from .run import Run, not_finite

SMALL_VALIDATIONS = 20
"""How often a run looks at the first validation rows."""


def glance(run: Run) -> tuple[float, float] | None:
    """Loss and accuracy over the first validation rows, at about twenty steps of a run."""
    every = max(1, run.total_steps // SMALL_VALIDATIONS)
    if run.small_validation is None or run.step % every:
        return None
    seen = result_of(evaluation(run, run.small_validation))
    if not math.isfinite(seen[0]):
        raise not_finite(run, f"The validation loss after step {run.step} is {seen[0]}.")
    run.glances.append((run.step, *seen))
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
