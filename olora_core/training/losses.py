"""The losses of a micro-batch: cross-entropy of its trained tokens, or DPO of its pairs.

Both are sums, the first weighted by the tokens' weights. The caller divides by the weights of the trained
tokens, or the number of pairs, of the whole optimizer batch, so that a batch gives the same gradient however
it is cut into micro-batches.
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
    """Scalar, nats: the weighted sum over the trained tokens in fp32, or the sum over the pairs in fp64."""
    correct: Tensor
    """Scalar int64: trained tokens that are the model's likeliest, or pairs whose margin is positive."""
    count: int
    """Number of trained tokens, or of pairs."""
    weight: float
    """The sum of the weights in `total`: `count`, unless the tokens have weights."""
    logits: Tensor | None
    """(rows, length, vocabulary) with `needs_logits`, else None."""
    margin: Tensor | None = None
    """For pairs, scalar fp64: the sum of reward margins, the better answer's reward minus the worse one's."""


class Loss(Protocol):
    """The loss of one type of training.

    With `needs_logits` the model builds the logits of all positions, for methods whose penalty reads them.
    Without, a plain LM head sees only the positions that predict a trained token: the same loss, less work.
    """

    def __call__(
        self, model: PreTrainedModel, batch: MicroBatch, passes: Passes, *, needs_logits: bool = False
    ) -> TaskLoss: ...


def loss_of(spec: TrainSpec, *, evaluating: bool = False) -> Loss:
    """The loss for the type of a resolved spec; without label smoothing for an evaluation."""
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
    """The supervised loss: the sum of weight × cross-entropy over the trained tokens.

    Label smoothing (arXiv 1512.00567, section 7) moves a share of each target's probability to the whole
    vocabulary, evenly.
    """
    head = model.get_output_embeddings()
    if passes.plain_head and not needs_logits and type(head) is nn.Linear:
        hidden = passes.hidden(model, batch)
        total, correct = FrozenHeadLoss.apply(
            hidden, head.weight, head.bias, batch.targets, smoothing, batch.weights
        )
        return TaskLoss(total, correct, batch.trained_tokens, batch.weight, None)
    chosen, logits = _chosen(model, batch, passes, needs_logits)
    total = _cross_entropy(chosen.float(), batch, smoothing)
    correct = (chosen.detach().argmax(dim=-1) == batch.targets).sum()
    return TaskLoss(total, correct, batch.trained_tokens, batch.weight, logits)


def _cross_entropy(chosen: Tensor, batch: MicroBatch, smoothing: float) -> Tensor:
    """The weighted sum over the trained tokens, given their logits `chosen` (trained, vocabulary)."""
    if batch.weights is None:
        return F.cross_entropy(chosen, batch.targets, reduction="sum", label_smoothing=smoothing)
    of_tokens = F.cross_entropy(chosen, batch.targets, reduction="none", label_smoothing=smoothing)
    return (batch.weights * of_tokens).sum()


def preference_loss(
    model: PreTrainedModel, batch: MicroBatch, passes: Passes, *, beta: float, needs_logits: bool = False
) -> TaskLoss:
    """DPO (arXiv 2305.18290, equation 7): rows 2i and 2i + 1 hold the better and the worse answer.

    `-log sigmoid(beta ((log p(c) - log p_ref(c)) - (log p(r) - log p_ref(r))))`, where p_ref is the model
    with its adapters off: no second copy of the weights, and the same micro-batch, so that an adapter that
    changes nothing gives log 2 to the last bit.
    """
    with adapters_off(model), torch.no_grad():
        reference = _answer_log_probs(_chosen(model, batch, passes, needs_logits)[0], batch)
    chosen, logits = _chosen(model, batch, passes, needs_logits)
    # (pairs, 2) log-ratios to the reference, in nats
    ratios = (_answer_log_probs(chosen, batch) - reference).view(-1, 2)
    margins = beta * (ratios[:, 0] - ratios[:, 1])
    # logsigmoid and not log of sigmoid, which underflows to log 0 for very negative margins. Pairs are few,
    # so fp64 costs nothing, and the sum does not depend on how the batch was cut.
    total = -F.logsigmoid(margins).double().sum()
    margins = margins.detach()
    pairs = len(margins)
    return TaskLoss(total, (margins > 0).sum(), pairs, pairs, logits, margins.double().sum())


def _answer_log_probs(chosen: Tensor, batch: MicroBatch) -> Tensor:
    """(rows,) fp32: the log-probability of each row's trained tokens, given their logits `chosen`
    (trained, vocabulary).

    Each row is summed by itself: a scatter-add on a GPU would add in an order that varies between runs.
    """
    of_tokens = -F.cross_entropy(chosen.float(), batch.targets, reduction="none")
    return torch.stack([row.sum() for row in of_tokens.split(batch.trained_by_row)])


def _chosen(
    model: PreTrainedModel, batch: MicroBatch, passes: Passes, needs_logits: bool
) -> tuple[Tensor, Tensor | None]:
    """Logits of the trained tokens (trained, vocabulary), and with `needs_logits` those of all positions
    (rows, length, vocabulary)."""
    if needs_logits or not passes.plain_head:
        chosen, logits = passes.logits(model, batch)
        return chosen, logits if needs_logits else None
    return model.get_output_embeddings()(passes.hidden(model, batch)), None


class FrozenHeadLoss(torch.autograd.Function):
    """Cross-entropy through a frozen LM head, summed, with the gradient computed in the forward.

    hidden (n, d), weight (V, d), bias (V) or None, targets (n), weights of the targets (n) fp32 or None for
    1 → the loss in nats, scalar fp32, and the number of targets that are the likeliest token, scalar int64.

    The n×V logits are the largest tensor of a training step, and they are never held at once. Since the head
    is frozen, only hidden needs a gradient, `(p − target) W` with p the softmax, which is n×d. So each chunk
    of logits is turned into its rows of that gradient at once and dropped, and the backward only scales them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        smoothing: float,
        target_weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        needs_gradient = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if needs_gradient else None
        size = max(1, LOGITS_AT_ONCE // weight.shape[0])
        for start in range(0, len(targets), size):  # `size` positions at a time
            piece, wanted = slice(start, start + size), targets[start : start + size, None]
            logits = F.linear(hidden[piece], weight, bias)
            correct += (logits.max(dim=-1, keepdim=True).indices == wanted).sum()
            # fp32 whatever the model computes in: in bf16 the sum over V tokens would lose its small terms.
            log_p = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
            of_targets = log_p.gather(1, wanted).squeeze(1)
            means = log_p.mean(dim=-1) if smoothing else None
            if target_weights is not None:
                of_targets = target_weights[piece] * of_targets
                means = None if means is None else target_weights[piece] * means
            total -= (1 - smoothing) * of_targets.sum()
            if means is not None:
                total -= smoothing * means.sum()
            if gradient is not None:
                # In place, from log_p to `p − target`: a chunk is the step's largest buffer. With smoothing
                # the target is 1 − smoothing at its token plus smoothing / V everywhere.
                p = log_p.exp_()
                p.scatter_add_(1, wanted, torch.full_like(wanted, -(1 - smoothing), dtype=p.dtype))
                if smoothing:
                    p -= smoothing / weight.shape[0]
                torch.mm(p.to(weight.dtype), weight, out=gradient[piece])
                del p
            del logits, log_p  # or the next chunk would be computed while this one is still held
        ctx.save_for_backward(gradient, target_weights)
        ctx.mark_non_differentiable(correct)
        return total, correct

    @staticmethod
    def backward(ctx: Any, of_total: Tensor, of_correct: Tensor) -> tuple[Tensor | None, ...]:
        gradient, target_weights = ctx.saved_tensors
        # `of_total` is a scalar, such as 1 / trained tokens: multiplied in fp32, and rounded once.
        scale = of_total if target_weights is None else of_total * target_weights[:, None]
        return (gradient.float() * scale).to(gradient.dtype), None, None, None, None, None


def set_training(model: PreTrainedModel, spec: TrainSpec) -> None:
    """Sets the modules' modes for a step: the whole model in training mode, for DPO only its adapters.

    In DPO, the base's own dropout would move the policy away from its reference before anything is learned.
    Quantised layers stay in eval mode, in which they are served: LLM.int8 on a CPU multiplies differently in
    training mode.
    """
    model.train(spec.type != "dpo")
    for _, layer in quantised_layers(model):
        layer.eval()
    for layer in attached(model):
        layer.adapter.train()
    if spec.type == "dpo" and spec.hyperparameters.gradient_checkpointing is True:
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = True  # the block alone, not its children: else it does not checkpoint
