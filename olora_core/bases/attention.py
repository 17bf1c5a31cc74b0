"""Attention of packed rows, each segment on its own: nothing is computed only to be masked away.

transformers tells the segments of a packed row by positions that start again, builds a T×T mask and computes
all of it. Here the mask that travels through the model is a list of offsets, and attention follows it: by
SDPA segment by segment, on a GPU in half precision by torch's variable-length kernel. Every other mask goes
to transformers' own SDPA, so that ordinary rows are computed as they always were, bit for bit.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "olora_segments"
PLAIN_LAYERS = {"full_attention", "sliding_attention"}
UNLIMITED = 2**62
SHORT = 192
"""Tokens below which a CPU's attention in bf16 takes up to three times as long as in fp32, casts included."""


class Segments(Tensor):
    """(1, 1, 1, n + 1) int32: where the n segments of one row begin, and its end.

    Four axes, because transformers hands such a mask to every layer as it is.
    """

    lengths: tuple[int, ...]
    """The same without waiting for the device."""


def segments(lengths: Sequence[int], device: torch.device) -> Segments:
    """The mask of one row that holds segments of these lengths, end to end."""
    offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    mask = offsets.view(1, 1, 1, -1).to(device, non_blocking=True).as_subclass(Segments)
    mask.lengths = tuple(lengths)
    return mask


def segment_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **how: Any
) -> tuple[Tensor, None]:
    """Causal attention: query (rows, heads, T, d), key, value (rows, key heads, T, d) → (…, T, heads, d)."""
    if not isinstance(attention_mask, Segments):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **how)
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and not how.get("dropout"):
        return _varlen(query, key, value, attention_mask, how.get("scaling")), None
    lengths = attention_mask.lengths
    pieces = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    return torch.cat([_of_one_segment(module, *qkv, **how) for qkv in pieces], dim=1), None


def _of_one_segment(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **how: Any) -> Tensor:
    dtype = query.dtype
    if dtype == torch.bfloat16 and query.device.type == "cpu" and query.shape[2] < SHORT:
        query, key, value = query.float(), key.float(), value.float()
    # The mask is None and the layer's sliding window no shorter than a segment: plain causal attention.
    return sdpa_attention_forward(module, query, key, value, None, **how)[0].to(dtype)


def _varlen(query: Tensor, key: Tensor, value: Tensor, mask: Segments, scale: float | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # needs a GPU build

    offsets, longest = mask.as_subclass(Tensor).view(-1), max(mask.lengths)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, d)
    how: dict[str, Any] = {"scale": scale, "window_size": (-1, 0)}
    # The kernel shares key heads among query heads; later versions of torch ask for it by name.
    if q.shape[1] != k.shape[1] and "enable_gqa" in signature(varlen_attn).parameters:
        how["enable_gqa"] = True
    return varlen_attn(q, k, v, offsets, offsets, longest, longest, **how)[None]


AttentionInterface.register(NAME, segment_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def longest_segment(model: PreTrainedModel) -> int:
    """Tokens up to which a segment's attention is plain causal in every layer; 0 if that cannot be told."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not kinds <= PLAIN_LAYERS or getattr(config, "attention_chunk_size", None):
        return 0
    return getattr(config, "sliding_window", None) or UNLIMITED


def takes_segments(model: PreTrainedModel) -> bool:
    """Whether this kind of model lets its attention be exchanged."""
    return (
        model.config._attn_implementation == "sdpa"
        and model._can_set_attn_implementation()
        and longest_segment(model) > 0
    )


@contextmanager
def segments_understood(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model's layers understand `Segments`. Ordinary masks mean what they did."""
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
