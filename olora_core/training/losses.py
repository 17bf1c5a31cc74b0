"""The losses of a micro-batch: cross-entropy of its trained tokens, or DPO of its pairs; sums of either.

Whoever calls divides by the trained tokens, or the pairs, of the whole optimizer batch, so that a batch gives
the same gradient however it is cut into micro-batches.
"""

from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..bases.passes import LOGITS_AT_ONCE, Passes
from ..data.batches import MicroBatch
from ..layers.adapter import adapters_off, attached
from ..layers.quantisation import quantised_layers
from ..specs import TrainSpec


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
    """One kind of training: how a micro-batch is judged.

    With `needs_logits` the model builds all logits, as methods with `needs_logits` want them. Without, and
    where the base has a plain head, that head sees only the positions that predict a trained token: the same
    values for less work.
    """

    def __call__(
        self, model: PreTrainedModel, batch: MicroBatch, passes: Passes, *, needs_logits: bool = False
    ) -> TaskLoss: ...


def loss_of(spec: TrainSpec, *, evaluating: bool = False) -> Loss:
    """The loss of a resolved spec's type; without label smoothing when it is to tell how good a model is."""
    if spec.type == "dpo":
        return partial(preference_loss, beta=spec.hyperparameters.beta)
    return partial(task_loss, smoothing=0.0 if evaluating else spec.hyperparameters.label_smoothing)


def task_loss(
    model: PreTrainedModel,
    batch: MicroBatch,
    passes: Passes,
    *,
    needs_logits: bool = False,
    smoothing: float = 0.0,
) -> TaskLoss:
    """The supervised loss. Label smoothing (arXiv 1512.00567, section 7) gives that share of each target's
    probability to the whole vocabulary evenly."""
    head = model.get_output_embeddings()
    if passes.plain_head and not needs_logits and type(head) is nn.Linear:
        hidden = passes.hidden(model, batch)
        total, correct = FrozenHeadLoss.apply(hidden, head.weight, head.bias, batch.targets, smoothing)
        return TaskLoss(total, correct, batch.trained_tokens, None)
    chosen, logits = _chosen(model, batch, passes, needs_logits)
    total = F.cross_entropy(chosen.float(), batch.targets, reduction="sum", label_smoothing=smoothing)
    correct = (chosen.detach().argmax(dim=-1) == batch.targets).sum()
    return TaskLoss(total, correct, batch.trained_tokens, logits)


def preference_loss(
    model: PreTrainedModel, batch: MicroBatch, passes: Passes, *, beta: float, needs_logits: bool = False
) -> TaskLoss:
    """DPO (arXiv 2305.18290, equation 7): rows 2i and 2i + 1 hold the better and the worse answer.

    `-log sigmoid(beta ((log p(c) - log p_ref(c)) - (log p(r) - log p_ref(r))))`, where p_ref is the model
    with its adapters off: the same weights and the same micro-batch, so that an adapter that changes nothing
    gives log 2 to the last bit.
    """
    with adapters_off(model), torch.no_grad():
        reference = _answer_log_probs(_chosen(model, batch, passes, needs_logits)[0], batch)
    chosen, logits = _chosen(model, batch, passes, needs_logits)
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


def _chosen(
    model: PreTrainedModel, batch: MicroBatch, passes: Passes, needs_logits: bool
) -> tuple[Tensor, Tensor | None]:
    """(trained, vocabulary) logits of the trained tokens; and all logits where they had to be built."""
    if needs_logits or not passes.plain_head:
        chosen, logits = passes.logits(model, batch)
        return chosen, logits if needs_logits else None
    return model.get_output_embeddings()(passes.hidden(model, batch)), None


class FrozenHeadLoss(torch.autograd.Function):
    """Cross-entropy through a frozen LM head, summed, whose gradient is found on the way forward.

    hidden (n, d), weight (V, d), bias (V) or None, targets (n) → the loss in nats, fp32, and how many targets
    were the likeliest. The n×V logits are never held at once: of a piece of them, `(p − target) W` is kept.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, smoothing: float
    ) -> tuple[Tensor, Tensor]:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        needs_gradient = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if needs_gradient else None
        size = max(1, LOGITS_AT_ONCE // weight.shape[0])
        for start in range(0, len(targets), size):
            piece, wanted = slice(start, start + size), targets[start : start + size, None]
            logits = F.linear(hidden[piece], weight, bias)
            correct += (logits.max(dim=-1, keepdim=True).indices == wanted).sum()
            log_p = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
            total -= (1 - smoothing) * log_p.gather(1, wanted).sum()
            if smoothing:
                total -= smoothing * log_p.mean(dim=-1).sum()
            if gradient is not None:
                p = log_p.exp_()
                p.scatter_add_(1, wanted, torch.full_like(wanted, -(1 - smoothing), dtype=p.dtype))
                if smoothing:
                    p -= smoothing / weight.shape[0]
                torch.mm(p.to(weight.dtype), weight, out=gradient[piece])
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(correct)
        return total, correct

    @staticmethod
    def backward(ctx: Any, of_total: Tensor, of_correct: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient.float() * of_total).to(gradient.dtype), None, None, None, None


def set_training(model: PreTrainedModel, spec: TrainSpec) -> None:
    """The modes of a step: all of the model in training, or for DPO its adapters alone.

    Dropout of the base's own would move the policy away from its reference before anything is learned.
    Quantised layers stay as they are served: LLM.int8 on a CPU has another product for training.
    """
    model.train(spec.type != "dpo")
    for _, layer in quantised_layers(model):
        layer.eval()
    for layer in attached(model):
        layer.adapter.train()
    if spec.type == "dpo" and spec.hyperparameters.gradient_checkpointing is True:
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = True  # of the block alone: only then does it checkpoint
