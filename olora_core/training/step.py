"""One optimizer step: its forward and backward passes, and what happens when memory runs out."""

import ctypes
import math
import time
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..bases.loading import Base
from ..bases.passes import evaluating
from ..data.batches import MicroBatch, micro_batches
from ..errors import TrainingError
from ..layers.adapter import adapters_off
from ..methods import Outputs
from ..progress import Note, Step
from .evaluate import quick_evaluation
from .losses import set_training
from .memory import can_checkpoint, is_out_of_memory, set_checkpointing
from .run import Run, not_finite

FILL_STEPS = 20
"""Steps from which `fill_note` is computed."""


def take_step(run: Run) -> Generator[Note, None, Step]:
    """One optimizer step; the order of the method's hooks is part of their contract."""
    began, step, rows = time.perf_counter(), run.step + 1, run.rows(run.step + 1)
    rate = write_learning_rates(run, step)
    set_training(run.base.model, run.spec)
    sums, tokens = yield from accumulate_within_memory(run, step, rows)
    # Summed, not averaged over the devices: every loss was divided by the weight of the whole batch already.
    sums = run.devices.sum_gradients(run.parameters, sums)
    # Clipped after the sum, so that the norm is the whole batch's on any number of devices, and before
    # `after_backward`, so that the hook sees the gradients that the optimizer will use.
    norm = nn.utils.clip_grad_norm_(run.parameters, run.hyperparameters.max_grad_norm)
    trained = int(run.data.training.trained_lengths[rows].sum())
    count, weight = int(run.data.training.counts[rows].sum()), run.data.training.weights[rows].sum().item()
    # The step's only wait for the device, with all numbers in one transfer. It cannot come after the
    # optimizer: a step that is not finite must not move the weights, or no checkpoint could be written.
    total, correct, margins, grad_norm = torch.cat([sums, norm.double()[None]]).tolist()
    mean, accuracy, margin = total / weight, correct / count, margins / count
    if not (math.isfinite(mean) and math.isfinite(grad_norm)):
        raise not_finite(
            run, f"Step {step} is not finite and was not applied: loss {mean}, gradient norm {grad_norm}."
        )
    run.method.after_backward(step)
    run.optimizer.step()
    run.method.after_step(step, run.optimizer)
    run.optimizer.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - began
    run.step, run.tokens, run.trained_tokens = step, run.tokens + tokens, run.trained_tokens + trained
    run.seconds += seconds
    run.history.append((step, mean, accuracy, count))
    seen = quick_evaluation(run)
    return Step(
        step=step,
        total_steps=run.total_steps,
        epoch=step / run.steps_per_epoch,
        loss=mean,
        accuracy=accuracy,
        trained_tokens=trained,
        tokens=tokens,
        learning_rate=rate,
        grad_norm=grad_norm,
        seconds=seconds,
        memory_bytes=peak_memory(run.base.device),
        valid_loss=seen[0] if seen else None,
        valid_accuracy=seen[1] if seen else None,
        reward_margin=margin if run.spec.type == "dpo" else None,
    )


def accumulate_within_memory(
    run: Run, step: int, rows: np.ndarray
) -> Generator[Note, None, tuple[Tensor, int]]:
    """`accumulate`, repeated with smaller passes for as long as a device runs out of memory.

    Nothing has moved before the optimizer steps, so a repeated attempt gives the step's own result.
    """
    while True:
        is_short = False
        try:
            with run.random:
                result = accumulate(run, rows)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if run.base.shards > 1:  # the other processes wait inside this pass, and would wait forever
                raise out_of_memory_error(run, step, batches_of(run, rows)) from None
            is_short = True
        # All retry when one must: they cut the batch into the same micro-batches and share them out.
        if not run.devices.barrier_any(is_short):
            return result
        run.optimizer.zero_grad(set_to_none=True)
        run.method.on_step_retry()
        yield reduce_memory(run, step, rows)


def write_learning_rates(run: Run, step: int) -> float:
    """Sets every group's rate for this step; returns the job's own rate, without a group's factors."""
    peak, multiplier = run.hyperparameters.learning_rate, run.schedule(step, run.total_steps)
    for group in run.optimizer.param_groups:
        scheduled = 1.0 if group["lr_by"] == "method" else multiplier
        group["lr"] = group.get("lr_peak", peak) * group["lr_multiplier"] * scheduled * group["lr_factor"]
    return peak * multiplier


def accumulate(run: Run, rows: np.ndarray) -> tuple[Tensor, int]:
    """Adds up the gradients of this process's share of an optimizer batch; `rows` (batch size,) are examples.

    Returns (3,) fp64, the sums over its share of the loss in nats, of `TaskLoss.correct` and of the margin;
    and the number of tokens in the whole batch.
    """
    weight = run.data.training.weights[rows].sum().item()
    batches = batches_of(run, rows)
    sums = torch.zeros(3, dtype=torch.float64, device=run.base.device)
    if run.base.shards > 1:
        run.devices.barrier()  # every pass gathers the base's shards from all processes
    assigned = run.devices.assign([batch.tokens for batch in batches], in_step=run.base.shards > 1)
    for position, counts in assigned:
        run.random.begin(run.step + 1, position)
        batch = batches[position].to(run.base.device)
        run.method.before_pass(batch)
        task = run.loss(run.base.model, batch, run.base.passes, needs_logits=run.method.needs_logits)
        outputs = Outputs(task.logits, batch.labels, task.total / task.weight, repeated=not counts)
        penalty = run.method.penalty(outputs, lambda batch=batch: base_logits(run.base, batch))
        run.method.after_pass(outputs)
        # Divided by the weight of the whole batch, not of the micro-batch: the gradients then add up to those
        # of one large batch, however it was cut. A penalty has no such weight, so it is averaged over the
        # passes.
        loss = task.total / weight
        if penalty is not None:
            loss = loss + penalty / len(batches)
        # A repeated pass adds zeros to the gradients. Its backward must run: with a sharded base it takes
        # part in the gathering of weights that the other processes wait for.
        (loss if counts else 0 * loss).backward()
        if not counts:
            continue
        margin = torch.zeros_like(task.total) if task.margin is None else task.margin
        sums += torch.stack([task.total.detach().double(), task.correct.double(), margin.double()])
    return sums, sum(batch.tokens for batch in batches)


def batches_of(run: Run, rows: np.ndarray) -> list[MicroBatch]:
    """The micro-batches of all processes for an optimizer batch; `rows` (batch size,) are its examples."""
    return micro_batches(
        run.data.training,
        rows,
        size=run.hyperparameters.micro_batch_size,
        tokens=run.micro_batch_tokens,
        packing=run.hyperparameters.packing,
        pad_token=run.base.padding,
    )


def fill_note(run: Run) -> Note:
    """How full the forward passes of the first steps are."""
    steps = min(FILL_STEPS, run.total_steps)
    batches = [batch for step in range(1, steps + 1) for batch in batches_of(run, run.rows(step))]
    tokens = sum(batch.tokens for batch in batches)
    padded = sum(batch.input_ids.numel() for batch in batches)
    room = sum(max(run.micro_batch_tokens, batch.input_ids.numel()) for batch in batches)
    packing = run.hyperparameters.packing
    return Note(
        "info",
        f"{'Packing' if packing else 'Padding'}: {100 * tokens / padded:.0f} % real tokens, batches "
        f"{100 * tokens / room:.0f} % full, {len(batches) / steps:.1f} forward passes per step.",
        {
            "packing": packing,
            "fill": tokens / padded,
            "efficiency": tokens / room,
            "passes": len(batches) / steps,
        },
    )


def reduce_memory(run: Run, step: int, rows: np.ndarray) -> Note:
    """Halves the tokens of a pass, or turns on gradient checkpointing when a pass holds one example already.

    Raises TrainingError when both have been done.
    """
    if run.base.device.type == "cuda":
        torch.cuda.empty_cache()
    batches = batches_of(run, rows)
    largest = max(batch.input_ids.numel() for batch in batches)
    if len(batches) < len(rows):
        run.micro_batch_tokens = max(16, min(run.micro_batch_tokens, largest) // 2)
        done = f"a forward pass now holds at most {run.micro_batch_tokens} tokens"
    elif not run.checkpointing and can_checkpoint(run.base.model, run.spec):
        run.checkpointing = True
        set_checkpointing(run.base.model, True)
        done = "gradient checkpointing is now on"
    else:
        raise out_of_memory_error(run, step, batches)
    # A penalty on the logits may be a function of the whole pass, such as BA-LoRA's spectrum.
    same = "" if run.method.needs_logits else " The result does not change."
    return Note(
        "warn",
        f"Step {step} ran out of memory and is repeated: {done}.{same}",
        {"step": step, "micro_batch_tokens": run.micro_batch_tokens, "checkpointing": run.checkpointing},
    )


def out_of_memory_error(run: Run, step: int, batches: list[MicroBatch]) -> TrainingError:
    largest = max(batch.input_ids.numel() for batch in batches)
    if run.base.shards > 1:
        what, remedy = "with its sharded base", "hyperparameters.micro_batch_tokens, context_length"
    else:
        what, remedy = "not even one example at a time", "hyperparameters.context_length"
    return TrainingError(
        f"Step {step} does not fit into the device's memory, {what} ({largest} tokens). Lower {remedy} or "
        "adapter.rank, or use a larger device.",
        code="out_of_memory",
    )


@torch.no_grad()
def base_logits(base: Base, batch: MicroBatch) -> Tensor:
    """The base's logits for a micro-batch, (rows, length, vocabulary): adapters off, eval mode."""
    with adapters_off(base.model), evaluating(base.model):
        return base.passes.logits(base.model, batch)[1]


def forget_peak_memory(device: torch.device) -> None:
    """Resets what `peak_memory` returns; without effect where the system does not allow it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError, AttributeError):
        # Memory that earlier runs freed stays in glibc's heap, where it would count as used.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak: of the device, or on a CPU of this process (ru_maxrss includes its parent's)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024
