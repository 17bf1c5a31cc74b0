"""Forward passes of a base on a micro-batch. What its family allows is found by probing the model once."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data.batches import MicroBatch
from . import attention

SEGMENT_TOLERANCE = 3e-2
"""Largest difference between an example's logits in a packed row and alone, over the largest |logit|.

Between two attention kernels, bf16 rounding causes up to 1.3e-2 in eight layers.
"""
LEAK_TOLERANCE = 1e-2
"""Largest difference between an example's logits after two different neighbours in a packed row, relative to
the largest |logit|."""
ROUNDINGS = 64
"""The same bound in units of the dtype's eps; the smaller one applies, so that it is 7.6e-6 in fp32."""
AHEAD_TOLERANCE = 1e-5
"""Largest gradient of the first tokens' logits with respect to a later token's embedding, over the largest
with respect to their own.

A causal model's is exactly 0 in every dtype, but for convolutions that are computed by transforms, which
leave fp32's rounding. A model that looks both ways has 1e-3 or more, even with random weights.
"""
LOGITS_AT_ONCE = 2**23
"""Logits that the fused loss holds at a time. More take memory and gain no speed, fewer are slower."""


@dataclass(frozen=True)
class Passes:
    """How a base computes its forward passes: what can be skipped, how packed examples are kept apart."""

    plain_head: bool
    """Logits are the LM head of the last hidden state, so that trained tokens alone need the head."""
    packing: Literal["segments", "positions"] | None
    """What keeps the examples of a packed row apart: `attention`, transformers, or None: nothing."""
    longest_segment: int
    """Longest example, in tokens, for which `attention` may be used."""

    def inputs(self, model: PreTrainedModel, batch: MicroBatch) -> dict[str, Tensor | bool]:
        """The model's arguments: (rows, length) ids; for a packed row also positions and mask."""
        inputs: dict[str, Tensor | bool] = {"input_ids": batch.input_ids, "use_cache": False}
        if batch.position_ids is None:
            return inputs
        inputs["position_ids"] = batch.position_ids
        understood = model.config._attn_implementation == attention.NAME
        if understood and self.packing == "segments" and max(batch.lengths) <= self.longest_segment:
            inputs["attention_mask"] = attention.segments(batch.segments, batch.input_ids.device)
        return inputs

    def hidden(self, model: PreTrainedModel, batch: MicroBatch) -> Tensor:
        """(trained, width) hidden states that predict a trained token. Requires `plain_head`."""
        hidden = model.get_decoder()(**self.inputs(model, batch)).last_hidden_state
        return hidden.flatten(0, 1).index_select(0, batch.positions)

    def logits(self, model: PreTrainedModel, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Logits that predict trained tokens, (trained, vocabulary); all, (rows, length, vocabulary)."""
        logits = model(**self.inputs(model, batch)).logits
        return logits.flatten(0, 1).index_select(0, batch.positions), logits


def passes_of(model: PreTrainedModel) -> Passes:
    """Probes a model without adapters, or with its adapters off."""
    longest = attention.longest_segment(model)
    by_positions = packing_is_exact(model)
    packing: Literal["segments", "positions"] | None = "positions" if by_positions else None
    if attention.takes_segments(model) and (by_positions or longest == attention.UNLIMITED):
        with attention.segments_understood(model):
            if packing_is_exact(model, as_segments=True):
                packing = "segments"
    return Passes(head_is_plain(model), packing, longest)


@torch.no_grad()
def head_is_plain(model: PreTrainedModel) -> bool:
    """Whether the model's logits are the LM head of the decoder's last hidden state, unchanged.

    Found by computing both and comparing bit for bit, since config keys that cap or scale logits have many
    names.
    """
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    # Some families have a layer of that name: ModernBERT's `decoder` is its LM head.
    if not isinstance(decoder, PreTrainedModel) or decoder is model or head is None:
        return False
    ids = probe_tokens(model, 8)
    with evaluating(model):
        whole = model(input_ids=ids, use_cache=False).logits
        parts = head(decoder(input_ids=ids, use_cache=False).last_hidden_state)
    return whole.shape == parts.shape and torch.equal(whole, parts)


@torch.no_grad()
def packing_is_exact(model: PreTrainedModel, *, as_segments: bool = False) -> bool:
    """Whether no example of a packed row attends to the one before it, when they are kept apart by restarting
    positions or, `as_segments`, by `Segments`.

    Two checks on 7 + 5 tokens: an example's logits in the row are those it has alone, up to rounding; and
    they do not change with the example before it. The second is stricter, because both rows are rounded
    alike: it also finds a model that attends to the neighbour only weakly. A family that makes masks of its
    own may not even compute such a row.
    """
    try:
        return _packs_exactly(model, as_segments)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False


def _packs_exactly(model: PreTrainedModel, as_segments: bool) -> bool:
    ids = probe_tokens(model, 12)
    other = torch.cat([ids[:, 7:], ids[:, :2], ids[:, 7:]], dim=1)
    positions = torch.cat([torch.arange(7), torch.arange(5)]).to(ids.device)[None]
    apart = {"attention_mask": attention.segments((7, 5), ids.device)} if as_segments else {}
    with evaluating(model):
        alone = model(input_ids=ids[:, 7:], use_cache=False).logits
        packed, after_other = (
            model(input_ids=row, position_ids=positions, use_cache=False, **apart).logits[:, 7:]
            for row in (ids, other)
        )
    scale, roundings = alone.abs().max(), ROUNDINGS * torch.finfo(alone.dtype).eps
    return bool(
        (alone - packed).abs().max() <= SEGMENT_TOLERANCE * scale
        and (after_other - packed).abs().max() <= min(LEAK_TOLERANCE, roundings) * scale
    )


def most_positions(model: PreTrainedModel) -> int | None:
    """The longest text, in tokens, that the model has positions for; None if it has no known limit.

    RoBERTa and its relatives count from behind the padding's index, so that they hold fewer than the config's
    `max_position_embeddings`.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not limit or limit < 0:
        return None
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module is not model.get_input_embeddings():
            if module.num_embeddings == limit and module.padding_idx is not None:
                return limit - module.padding_idx - 1
    return limit


def looks_ahead(model: PreTrainedModel) -> bool:
    """Whether logits depend on later tokens, as in an encoder, so that the model is not causal.

    Asked of the gradient of the first 6 tokens' logits with respect to the embeddings of 6 later ones.
    Logits themselves also change with a later token in causal models: experts round by the number of their
    tokens or drop some beyond their capacity, and LLM.int8 rounds by the largest input. None of these has a
    gradient, while attention has.
    """
    ids, first = probe_tokens(model, 12), 6
    with evaluating(model), torch.enable_grad(), _embeddings(model) as embedded:
        logits = model(input_ids=ids, use_cache=False).logits
        early = logits[:, :first].float().square().sum()
        gradients = torch.autograd.grad(early, embedded, allow_unused=True)
    own = ahead = 0.0
    for gradient in gradients:
        if gradient is not None and ids.shape[1] in gradient.shape:
            tokens = gradient.detach().float().movedim(gradient.shape.index(ids.shape[1]), 0)
            own = max(own, float(tokens[:first].abs().max()))
            ahead = max(ahead, float(tokens[first:].abs().max()))
    return ahead > AHEAD_TOLERANCE * own


@contextmanager
def _embeddings(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Inside, collects what the input embedding returns, as tensors that have a gradient."""
    embedded: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1].clone()  # which the model may change in place

    hook = model.get_input_embeddings().register_forward_hook(keep)
    try:
        yield embedded
    finally:
        hook.remove()


def probe_tokens(model: PreTrainedModel, length: int) -> Tensor:
    """(1, length) int64 token ids, distinct if the vocabulary is large enough."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return (torch.arange(length, device=model.device)[None] * 37 + 11) % vocabulary


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model is in eval mode; afterwards each module is in its former mode."""
    trained = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in trained:
            module.training = True
