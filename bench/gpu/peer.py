"""PEFT and transformers' Trainer, tuned, on the model object and the rows that ours trains on."""

import functools
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from olora_core.bases.loading import Base
from olora_core.bases.sites import target_sites
from olora_core.data.batches import IGNORED, epoch_order, micro_batches
from olora_core.data.examples import Examples
from olora_core.training.memory import is_out_of_memory
from olora_core.training.step import forget_peak_memory

from .measuring import (
    ALPHA,
    LEARNING_RATE,
    RANK,
    WARM_UP,
    DoesNotFit,
    Measured,
    Section,
    finish,
    first_sentence,
    measured_of,
    steps_to_time,
)
from .shapes import SEED, Work


@dataclass(frozen=True)
class Batches:
    """The peer's steps, one batch of rows each."""

    rows: list[dict[str, Tensor]]
    """`input_ids`, `labels` and, where rows are packed, `position_ids` of each row, (length,)."""
    size: int
    """Rows of a batch."""
    lengths: list[list[int]]
    """Of the segments in each row, without what it is filled with."""
    trained: list[int]
    """Trained tokens of each row."""

    @property
    def steps(self) -> int:
        return len(self.rows) // self.size


def batches_of(examples: Examples, size: int) -> Batches:
    """Each example a row of its own, in the order in which our run takes them."""
    rows, lengths, trained_counts = [], [], []
    for i in epoch_order(len(examples), seed=SEED, epoch=0):
        tokens, trained = examples.row(int(i))
        ids = torch.from_numpy(tokens.astype(np.int64))
        rows.append({"input_ids": ids, "labels": ids.masked_fill(~torch.from_numpy(trained), IGNORED)})
        lengths.append([len(tokens)])
        trained_counts.append(int(trained.sum()))
    return Batches(rows, size, lengths, trained_counts)


def packed_batches(examples: Examples, size: int, length: int) -> Batches:
    """All examples packed into rows of this length, as ours packs them; positions tell them apart."""
    whole = np.arange(len(examples))
    packed = micro_batches(examples, whole, size=len(examples), tokens=length, packing=True, pad_token=0)
    rows = []
    for batch in packed:
        filling = (0, length - batch.input_ids.shape[1])
        pad = functools.partial(torch.nn.functional.pad, pad=filling)
        assert batch.position_ids is not None
        rows.append(
            {
                "input_ids": pad(batch.input_ids[0]),
                "labels": pad(batch.labels[0], value=IGNORED),
                "position_ids": pad(batch.position_ids[0]),
            }
        )
    lengths = [list(batch.lengths) for batch in packed]
    return Batches(rows, size, lengths, [batch.trained_tokens for batch in packed])


def stacked(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows of one length to a batch."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def measure_peer(section: Section, base: Base, batches: Batches, work: Work, rows: int) -> Measured:
    """PEFT and Trainer, tuned, on the base's own model object, which is bare again afterwards."""
    from peft import LoraConfig, get_peft_model

    device, model, before = section.task.device, base.model, base.model.config._attn_implementation
    endings = sorted({site.name.rpartition(".")[2] for site in target_sites(model, "auto")})
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=endings, task_type="CAUSAL_LM"
    )
    forget_peak_memory(base.device)
    began = time.perf_counter()
    model.set_attn_implementation(peer_attention())
    tuned = get_peft_model(model, config)
    try:
        with tempfile.TemporaryDirectory(dir=section.task.scratch) as scratch:
            return train_peer(section, tuned, batches, work, rows, scratch, began)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise DoesNotFit(first_sentence(error)) from None
    finally:
        tuned.unload()
        model.zero_grad(set_to_none=True)
        model.set_attn_implementation(before)
        model.requires_grad_(False).eval()
        finish(device)


def peer_attention() -> str:
    """The fastest that is installed."""
    from transformers.utils import is_flash_attn_2_available

    return "flash_attention_2" if is_flash_attn_2_available() else "sdpa"


def train_peer(
    section: Section, tuned: Any, batches: Batches, work: Work, rows: int, scratch: str, began: float
) -> Measured:
    """`began` is when the adapters began to be made."""
    from transformers import PrinterCallback, Trainer, TrainerCallback

    size, device = section.size, section.task.device
    ends: list[float] = []
    losses: list[Tensor] = []

    class Clock(TrainerCallback):
        """Reads the time at an idle device: at the end of the warm-up, and of the steps that are timed."""

        def on_step_end(self, _: Any, state: Any, control: Any, **__: Any) -> None:
            done = state.global_step
            if done < WARM_UP - 1 or WARM_UP < done < stop[0]:
                return
            finish(device)
            ends.append(time.perf_counter())
            if done == WARM_UP:
                count = steps_to_time(size, ends[-1] - ends[0]) if len(ends) > 1 else size.steps[0]
                stop[0] = WARM_UP + min(count, batches.steps - WARM_UP)
            if done == stop[0]:
                control.should_training_stop = True

    class Recording(Trainer):
        def training_step(self, *arguments: Any, **named: Any) -> Tensor:
            loss = super().training_step(*arguments, **named)
            losses.append(loss.detach())
            return loss

    stop = [batches.steps]
    arguments = arguments_of(batches, device, scratch)
    trainer = Recording(
        tuned, arguments, train_dataset=batches.rows, data_collator=stacked, callbacks=[Clock()]
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    *_, warm, end = ends
    first, last = WARM_UP * batches.size, stop[0] * batches.size
    lengths = np.array([length for row in batches.lengths[first:last] for length in row], dtype=float)
    trained = sum(batches.trained[first:last])
    operations = work.operations(lengths.sum(), trained, (lengths**2).sum())
    steps, seconds = stop[0] - WARM_UP, end - warm
    return measured_of(
        section, rows, steps, seconds, lengths.sum(), operations, warm - began, float(losses[0])
    )


def arguments_of(batches: Batches, device: str, scratch: str) -> Any:
    """Trainer's, tuned: fused AdamW, no checkpointing, nothing logged or written."""
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=scratch,
        max_steps=batches.steps,
        per_device_train_batch_size=batches.size,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        bf16=True,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=device == "cuda",
        logging_strategy="no",
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=device == "cpu",
        seed=SEED,
    )
