"""One optimizer step: its passes, their gradients, and what happens when memory or numbers run out."""

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
from .evaluate import glance
from .losses import set_training
from .memory import can_checkpoint, is_out_of_memory, set_checkpointing
from .run import Run, not_finite

FILL_STEPS = 20
"""Steps whose passes are looked at to say how full they are."""


def take_step(run: Run) -> Generator[Note, None, Step]:
    """One optimizer step; the order of the method's hooks is part of their contract."""
    began, step, rows = time.perf_counter(), run.step + 1, run.rows(run.step + 1)
    rate = write_learning_rates(run, step)
    set_training(run.base.model, run.spec)
    while True:
        is_short = False
        try:
            with run.random:
                sums, tokens = accumulate(run, rows)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if run.base.shards > 1:  # the others wait in the midst of this pass
                raise no_room(run, step, batches_of(run, rows)) from None
            is_short = True
        # One device that is short of memory is enough for all to begin again, since they share the batches.
        if not run.devices.meet(is_short):
            break
        # Nothing has moved yet: the step begins again, with less at a time.
        run.optimizer.zero_grad(set_to_none=True)
        run.method.step_again()
        yield need_less(run, step, rows)
    sums = run.devices.sum_gradients(run.parameters, sums)
    norm = nn.utils.clip_grad_norm_(run.parameters, run.hyperparameters.max_grad_norm)
    trained = int(run.data.training.trained_lengths[rows].sum())
    weight = int(run.data.training.weights[rows].sum())
    # The one wait for the device in a step: a step that is not finite must not move the weights.
    *means, grad_norm = torch.cat([sums / weight, norm.double()[None]]).tolist()
    mean, accuracy, margin = means
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
    run.history.append((step, mean, accuracy, weight))
    seen = glance(run)
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


def write_learning_rates(run: Run, step: int) -> float:
    """Sets every group's rate for this step, anew; returns the job's own."""
    peak, multiplier = run.hyperparameters.learning_rate, run.schedule(step, run.total_steps)
    for group in run.optimizer.param_groups:
        scheduled = 1.0 if group["lr_by"] == "method" else multiplier
        group["lr"] = group.get("lr_peak", peak) * group["lr_multiplier"] * scheduled * group["lr_factor"]
    return peak * multiplier


def accumulate(run: Run, rows: np.ndarray) -> tuple[Tensor, int]:
    """Gradients of one optimizer batch. Returns (3,) fp64, the sums of loss, hits and margin; and tokens."""
    weight = int(run.data.training.weights[rows].sum())
    batches = batches_of(run, rows)
    sums = torch.zeros(3, dtype=torch.float64, device=run.base.device)
    if run.base.shards > 1:
        run.devices.meet()  # every pass over the base takes all devices
    mine = run.devices.mine([batch.tokens for batch in batches], in_step=run.base.shards > 1)
    for position, counts in mine:
        run.random.begin(run.step + 1, position)
        batch = batches[position].to(run.base.device)
        run.method.before_pass(batch)
        task = run.loss(run.base.model, batch, run.base.passes, every_logit=run.method.needs_logits)
        outputs = Outputs(task.logits, batch.labels, task.total / task.weight, repeated=not counts)
        penalty = run.method.penalty(outputs, lambda batch=batch: base_logits(run.base, batch))
        run.method.after_pass(outputs)
        loss = task.total / weight
        if penalty is not None:
            loss = loss + penalty / len(batches)
        (loss if counts else 0 * loss).backward()
        if not counts:
            continue
        margin = torch.zeros_like(task.total) if task.margin is None else task.margin
        sums += torch.stack([task.total.detach().double(), task.correct.double(), margin.double()])
    return sums, sum(batch.tokens for batch in batches)


def batches_of(run: Run, rows: np.ndarray) -> list[MicroBatch]:
    return micro_batches(
        run.data.training,
        rows,
        size=run.hyperparameters.micro_batch_size,
        tokens=run.micro_batch_tokens,
        packing=run.hyperparameters.packing,
        pad_token=run.base.tokenizer.pad_token_id or 0,
    )


def fill_note(run: Run) -> Note:
    """How full the passes of the first steps are."""
    steps = min(FILL_STEPS, run.total_steps)
    batches = [batch for step in range(1, steps + 1) for batch in batches_of(run, run.rows(step))]
    tokens = sum(batch.tokens for batch in batches)
    padded = sum(batch.input_ids.numel() for batch in batches)
    room = sum(max(run.micro_batch_tokens, batch.input_ids.numel()) for batch in batches)
    packing = run.hyperparameters.packing
    return Note(
        "info",
        f"{'Packed' if packing else 'Padded'} passes: {tokens / padded:.0%} of what they compute are the "
        f"examples' tokens, {tokens / room:.0%} of the {run.micro_batch_tokens} they may hold; "
        f"{len(batches) / steps:.1f} a step.",
        {
            "packing": packing,
            "fill": tokens / padded,
            "efficiency": tokens / room,
            "passes": len(batches) / steps,
        },
    )


def need_less(run: Run, step: int, rows: np.ndarray) -> Note:
    """Halves what a pass holds, or checkpoints the blocks when it holds one example already.

    Raises TrainingError when neither is left.
    """
    if run.base.device.type == "cuda":
        torch.cuda.empty_cache()
    batches = batches_of(run, rows)
    largest = max(batch.input_ids.numel() for batch in batches)
    if len(batches) < len(rows):
        run.micro_batch_tokens = max(16, min(run.micro_batch_tokens, largest) // 2)
        done = f"passes hold at most {run.micro_batch_tokens} tokens from here on, and gradients accumulate"
    elif not run.checkpointing and can_checkpoint(run.base.model, run.spec):
        run.checkpointing = True
        set_checkpointing(run.base.model, True)
        done = "blocks are computed once more in the backward from here on"
    else:
        raise no_room(run, step, batches)
    # A penalty on the logits may look at a pass as a whole.
    same = "" if run.method.needs_logits else " The result does not change."
    return Note(
        "warn",
        f"Step {step} ran out of memory and begins again: {done}.{same}",
        {"step": step, "micro_batch_tokens": run.micro_batch_tokens, "checkpointing": run.checkpointing},
    )


def no_room(run: Run, step: int, batches: list[MicroBatch]) -> TrainingError:
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
    """What the base says of a batch: adapters off, eval mode."""
    with adapters_off(base.model), evaluating(base.model):
        return base.passes.logits(base.model, batch)[1]


def forget_peak_memory(device: torch.device) -> None:
    """From here on `peak_memory` tells of what comes; where the system does not allow that, of all so far."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError, AttributeError):
        # What earlier runs have freed lies about in glibc's heap, and would count as used.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Bytes: the device's peak, or on a CPU this process's own, which ru_maxrss mixes with its parent's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024
