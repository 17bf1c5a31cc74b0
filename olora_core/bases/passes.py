"""How a base is run forward on a micro-batch: what its family allows is found by asking the model once."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..data.batches import MicroBatch
from . import attention

SEGMENT_TOLERANCE = 3e-2
"""How far a packed example's logits may be from those it has alone, as a share of the largest |logit|.

Between two kernels for attention, bf16 rounding reaches 1.3e-2 in eight layers.
"""
LEAK_TOLERANCE = 1e-2
"""Likewise between logits that come by the same way and should be the same; or, if that is less, so many"""
ROUNDINGS = 64
"""units of rounding. Attention that crosses from one example to the next lies above it."""
LOGITS_AT_ONCE = 2**23
"""Logits that the fused loss holds at a time; fewer cost speed, more only memory."""


@dataclass(frozen=True)
class Passes:
    """What a base can do, so that a pass does no more than it must."""

    plain_head: bool
    """Logits are the LM head of the last hidden state, so that the head may see trained tokens alone."""
    packing: Literal["segments", "positions"] | None
    """What keeps the examples of one row apart: attention of our own, or transformers'; None: nothing."""
    longest_segment: int
    """Tokens of an example up to which attention of our own may be used."""

    def inputs(self, model: PreTrainedModel, batch: MicroBatch) -> dict[str, Tensor | bool]:
        """The model's arguments for a micro-batch."""
        inputs: dict[str, Tensor | bool] = {"input_ids": batch.input_ids, "use_cache": False}
        if batch.position_ids is None:
            return inputs
        inputs["position_ids"] = batch.position_ids
        understood = model.config._attn_implementation == attention.NAME
        if understood and self.packing == "segments" and max(batch.lengths) <= self.longest_segment:
            inputs["attention_mask"] = attention.segments(batch.segments, batch.input_ids.device)
        return inputs

    def hidden(self, model: PreTrainedModel, batch: MicroBatch) -> Tensor:
        """(trained, width) hidden states that predict a trained token; for a plain head alone."""
        hidden = model.get_decoder()(**self.inputs(model, batch)).last_hidden_state
        return hidden.flatten(0, 1).index_select(0, batch.positions)

    def logits(self, model: PreTrainedModel, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """(trained, vocabulary) logits of the trained tokens; and all of them, (rows, length, vocabulary)."""
        logits = model(**self.inputs(model, batch)).logits
        return logits.flatten(0, 1).index_select(0, batch.positions), logits


def passes_of(model: PreTrainedModel) -> Passes:
    """Asks a model that bears no adapters, or whose adapters are off."""
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
def packing_is_exact(model: PreTrainedModel, *, as_segments: bool = False) -> bool:
    """Whether one example of a packed row is kept from attending to the one before it: by positions that
    start again, or by `Segments` where the model understands them.

    Also by two different examples before it: what leaks out of them differs, while all else rounds alike, so
    that a model which hardly attends to them is found out as well.
    """
    ids = _probe_tokens(model, 12)
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
