"""How good a model is on examples it does not train on, and what it says."""

import math
import time
from collections.abc import Generator
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from .bases.loading import Base
from .bases.passes import evaluating
from .batches import MicroBatch, micro_batches
from .devices import ALONE, Devices
from .errors import ModelError
from .examples import Examples
from .losses import Loss, task_loss
from .progress import Phase
from .templates import end_of_turn_tokens, normalised

ROWS_AT_ONCE = 256
"""Examples that are cut into passes together."""


def evaluate(
    base: Base,
    examples: Examples,
    *,
    size: int,
    tokens: int,
    packing: bool,
    loss_of_batch: Loss = task_loss,
    devices: Devices = ALONE,
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
        for position, counts in devices.mine([batch.tokens for batch in batches], in_step=base.shards > 1):
            if base.shards > 1:
                devices.meet()  # every pass over the base takes all devices
            seen = judged(batches[position])
            if counts:
                told[position] = seen
                done += len(batches[position].lengths) // examples.sides * devices.count
            yield Phase("evaluating", min(done, len(examples)), len(examples))
        figures += told
    devices.meet()
    sums = devices.sum(torch.tensor(figures, dtype=torch.float64)).tolist()
    total, correct, weight = (sum(column) for column in zip(*sums, strict=True))
    return total / weight, correct / weight


def generate(base: Base, messages: list[dict[str, Any]], max_new_tokens: int) -> str:
    """What the model answers to a conversation, likeliest token by likeliest token."""
    if not base.tokenizer.chat_template:
        raise ModelError(
            f"Base model '{base.name}' has no chat template, so it cannot answer a conversation."
        )
    prompt = base.tokenizer.apply_chat_template(
        normalised(messages), add_generation_prompt=True, return_dict=True
    )
    return answer(base, prompt["input_ids"], max_new_tokens)


def answer(base: Base, prompt: list[int], max_new_tokens: int, *, until: float = math.inf) -> str:
    """What the model makes of these tokens, likeliest token by likeliest token, until that monotonic time.

    The habits of the base's own generation config (sampling, penalties) are left aside.
    """
    ends = end_of_turn_tokens(base.tokenizer, base.model.generation_config.eos_token_id)
    how = GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        max_new_tokens=max_new_tokens,
        max_time=None if until == math.inf else max(0.0, until - time.monotonic()),
        eos_token_id=sorted(ends),
        pad_token_id=base.tokenizer.pad_token_id or 0,
    )
    input_ids = torch.tensor([prompt], device=base.device)
    with evaluating(base.model), torch.no_grad():
        tokens = base.model.generate(
            input_ids=input_ids, attention_mask=torch.ones_like(input_ids), generation_config=how
        )
    return base.tokenizer.decode(tokens[0, len(prompt) :], skip_special_tokens=True).strip()
