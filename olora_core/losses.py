"""The supervised loss: cross-entropy summed over the trained tokens of a micro-batch.

Whoever calls divides by the trained tokens of the whole optimizer batch, so that a batch gives the same
gradient however it is cut into micro-batches.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from .data import MicroBatch

SEGMENT_TOLERANCE = 1e-2
"""How far a packed example's logits may be from those it has alone, as a share of the largest |logit|.

Rounding stays below it in bf16; attention that crosses from one example to the next lies far above it.
"""


class TaskLoss(NamedTuple):
    """One micro-batch's loss, without any penalty."""

    total: Tensor
    """Scalar fp32: nats, summed over the trained tokens."""
    correct: Tensor
    """Scalar int64: trained tokens that the model itself finds likeliest."""
    logits: Tensor | None
    """(rows, length, vocabulary) when asked for."""


def task_loss(model: PreTrainedModel, batch: MicroBatch, *, every_logit: bool) -> TaskLoss:
    """Runs the model on a micro-batch.

    With `every_logit` the model builds all logits, as methods with `needs_logits` want them. Without, the
    LM head sees only the positions that predict a trained token: the same values for less work, allowed
    where `head_is_plain`.
    """
    if every_logit:
        logits = model(**_inputs(batch)).logits
        chosen = logits.flatten(0, 1).index_select(0, batch.positions)
    else:
        hidden = model.get_decoder()(**_inputs(batch)).last_hidden_state
        logits = None
        chosen = model.get_output_embeddings()(hidden.flatten(0, 1).index_select(0, batch.positions))
    total = F.cross_entropy(chosen.float(), batch.targets, reduction="sum")
    correct = (chosen.detach().argmax(dim=-1) == batch.targets).sum()
    return TaskLoss(total, correct, logits)


def _inputs(batch: MicroBatch) -> dict[str, Tensor | bool]:
    inputs: dict[str, Tensor | bool] = {"input_ids": batch.input_ids, "use_cache": False}
    if batch.position_ids is not None:
        inputs["position_ids"] = batch.position_ids
    return inputs


@torch.no_grad()
def head_is_plain(model: PreTrainedModel) -> bool:
    """Whether logits are the LM head of the decoder's last hidden state and nothing more.

    Found by comparing both ways bit for bit, since models cap or scale their logits under many names.
    """
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    if decoder is None or decoder is model or head is None:
        return False
    ids = _probe_tokens(model, 8)
    with evaluating(model):
        whole = model(input_ids=ids, use_cache=False).logits
        parts = head(decoder(input_ids=ids, use_cache=False).last_hidden_state)
    return whole.shape == parts.shape and torch.equal(whole, parts)


@torch.no_grad()
def packing_is_exact(model: PreTrainedModel) -> bool:
    """Whether positions that start again keep one example of a row from attending to the one before it."""
    ids = _probe_tokens(model, 12)
    positions = torch.cat([torch.arange(7), torch.arange(5)]).to(ids.device)[None]
    with evaluating(model):
        alone = model(input_ids=ids[:, 7:], use_cache=False).logits
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 7:]
    return bool((alone - packed).abs().max() <= SEGMENT_TOLERANCE * alone.abs().max())


def _probe_tokens(model: PreTrainedModel, length: int) -> Tensor:
    """(1, length) distinct tokens where the vocabulary allows."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return (torch.arange(length, device=model.device)[None] * 37 + 11) % vocabulary


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model is in eval mode; afterwards in the mode it was in."""
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)
