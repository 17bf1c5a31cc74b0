"""The losses of a micro-batch: cross-entropy of its trained tokens, or DPO of its pairs; sums of either.

Whoever calls divides by the trained tokens, or the pairs, of the whole optimizer batch, so that a batch gives
the same gradient however it is cut into micro-batches.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from .adapter import adapters_off, attached
from .batches import MicroBatch
from .specs import TrainSpec

SEGMENT_TOLERANCE = 1e-2
"""How far a packed example's logits may be from those it has alone, as a share of the largest |logit|.

Rounding stays below it in bf16; attention that crosses from one example to the next lies far above it.
"""
ROUNDINGS = 64
"""How many units of rounding may lie between two logits that should be the same."""


class TaskLoss(NamedTuple):
    """One micro-batch's loss, without any penalty."""

    total: Tensor
    """Scalar, nats: the sum over the trained tokens in fp32, or over the pairs in fp64."""
    correct: Tensor
    """Scalar int64: trained tokens that the model itself finds likeliest, or pairs it ranks right."""
    weight: int
    """How many trained tokens or pairs these are."""
    logits: Tensor | None
    """(rows, length, vocabulary) when asked for."""
    margin: Tensor | None = None
    """Scalar fp64, of pairs: the sum of what the better answer's reward exceeds the worse one's by."""


class Loss(Protocol):
    """One kind of training: how a micro-batch is judged."""

    def __call__(self, model: PreTrainedModel, batch: MicroBatch, *, every_logit: bool) -> TaskLoss: ...


def loss_of(spec: TrainSpec) -> Loss:
    """The loss of a resolved spec's type."""
    if spec.type == "dpo":
        return partial(preference_loss, beta=spec.hyperparameters.beta)
    return task_loss


def task_loss(model: PreTrainedModel, batch: MicroBatch, *, every_logit: bool) -> TaskLoss:
    """The supervised loss. `every_logit` is as for `_forward`."""
    chosen, logits = _forward(model, batch, every_logit)
    total = F.cross_entropy(chosen.float(), batch.targets, reduction="sum")
    correct = (chosen.detach().argmax(dim=-1) == batch.targets).sum()
    return TaskLoss(total, correct, batch.trained_tokens, logits)


def preference_loss(model: PreTrainedModel, batch: MicroBatch, *, beta: float, every_logit: bool) -> TaskLoss:
    """DPO (arXiv 2305.18290, equation 7): rows 2i and 2i + 1 hold the better and the worse answer.

    `-log sigmoid(beta ((log p(c) - log p_ref(c)) - (log p(r) - log p_ref(r))))`, where p_ref is the model
    with its adapters off: the same weights and the same micro-batch, so that an adapter that changes nothing
    gives log 2 to the last bit.
    """
    with adapters_off(model), torch.no_grad():
        reference = _answer_log_probs(_forward(model, batch, every_logit)[0], batch)
    chosen, logits = _forward(model, batch, every_logit)
    # (pairs, 2) log-ratios to the reference, in nats
    ratios = (_answer_log_probs(chosen, batch) - reference).view(-1, 2)
    margins = beta * (ratios[:, 0] - ratios[:, 1])
    total = -F.logsigmoid(margins).double().sum()
    margins = margins.detach()
    return TaskLoss(total, (margins > 0).sum(), len(margins), logits, margins.double().sum())


def _answer_log_probs(chosen: Tensor, batch: MicroBatch) -> Tensor:
    """(rows,) fp32: log-probability of each row's trained tokens, summed in an order that never varies."""
    of_tokens = -F.cross_entropy(chosen.float(), batch.targets, reduction="none")
    return torch.stack([row.sum() for row in of_tokens.split(batch.trained_by_row)])


def _forward(model: PreTrainedModel, batch: MicroBatch, every_logit: bool) -> tuple[Tensor, Tensor | None]:
    """(trained, vocabulary) logits of the trained tokens; and all logits, or None.

    With `every_logit` the model builds all logits, as methods with `needs_logits` want them. Without, the
    LM head sees only the positions that predict a trained token: the same values for less work, allowed
    where `head_is_plain`.
    """
    if every_logit:
        logits = model(**_inputs(batch)).logits
        return logits.flatten(0, 1).index_select(0, batch.positions), logits
    hidden = model.get_decoder()(**_inputs(batch)).last_hidden_state
    return model.get_output_embeddings()(hidden.flatten(0, 1).index_select(0, batch.positions)), None


def set_training(model: PreTrainedModel, spec: TrainSpec) -> None:
    """The modes of a step: all of the model in training, or for DPO its adapters alone.

    Dropout of the base's own would move the policy away from its reference before anything is learned.
    """
    model.train(spec.type != "dpo")
    for layer in attached(model):
        layer.adapter.train()


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
    """Whether positions that start again keep one example of a row from attending to the one before it.

    Also by two different examples before it: what leaks out of them differs, while all else rounds alike, so
    that a model which hardly attends to them is found out as well.
    """
    ids = _probe_tokens(model, 12)
    other = torch.cat([ids[:, 7:], ids[:, :2], ids[:, 7:]], dim=1)
    positions = torch.cat([torch.arange(7), torch.arange(5)]).to(ids.device)[None]
    with evaluating(model):
        alone = model(input_ids=ids[:, 7:], use_cache=False).logits
        packed, after_other = (
            model(input_ids=row, position_ids=positions, use_cache=False).logits[:, 7:]
            for row in (ids, other)
        )
    scale, roundings = alone.abs().max(), ROUNDINGS * torch.finfo(alone.dtype).eps
    return bool(
        (alone - packed).abs().max() <= SEGMENT_TOLERANCE * scale
        and (after_other - packed).abs().max() <= min(SEGMENT_TOLERANCE, roundings) * scale
    )


def _probe_tokens(model: PreTrainedModel, length: int) -> Tensor:
    """(1, length) distinct tokens where the vocabulary allows."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return (torch.arange(length, device=model.device)[None] * 37 + 11) % vocabulary


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model is in eval mode; afterwards each of its modules in the mode it was in."""
    trained = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in trained:
            module.training = True
