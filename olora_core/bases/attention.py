"""Attention of packed rows, segment by segment.

transformers finds the segments of a packed row by restarting positions, builds a T×T mask and computes all T²
scores. With n segments of T/n tokens, only 1/n of them are needed. So here the mask passed through the model
is a list of offsets, and attention is computed within each segment: by SDPA, or on a GPU in half precision
by torch's variable-length kernel. Any other mask goes to transformers' own SDPA, so that rows that are not
packed are computed as without this module, bit for bit.
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
"""Longest segment of a model without a sliding window."""
SHORT = 192
"""Below this many tokens a CPU computes attention in fp32: up to three times as fast as bf16 there."""


class Segments(Tensor):
    """(1, 1, 1, n + 1) int32: offsets of the n segments of one row, and its length.

    Four axes, because transformers passes a 4-D mask to every layer unchanged.
    """

    lengths: tuple[int, ...]
    """Tokens of each segment, known without waiting for the device."""


def segments(lengths: Sequence[int], device: torch.device) -> Segments:
    """The mask of one row with segments of these lengths, (1, 1, 1, n + 1)."""
    offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    mask = offsets.view(1, 1, 1, -1).to(device, non_blocking=True).as_subclass(Segments)
    mask.lengths = tuple(lengths)
    return mask


def segment_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **how: Any
) -> tuple[Tensor, None]:
    """Causal attention: query (rows, heads, T, d), key, value (rows, key heads, T, d) → (rows, T, heads, d).

    With `Segments` as the mask there is one row, and no token attends to another segment.
    """
    if not isinstance(attention_mask, Segments):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **how)
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and not how.get("dropout"):
        return _varlen(query, key, value, attention_mask, how.get("scaling")), None
    lengths = attention_mask.lengths
    parts = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    return torch.cat([_one_segment(module, *qkv, **how) for qkv in parts], dim=1), None


def _one_segment(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **how: Any) -> Tensor:
    dtype = query.dtype
    if dtype == torch.bfloat16 and query.device.type == "cpu" and query.shape[2] < SHORT:
        query, key, value = query.float(), key.float(), value.float()
    # No mask: within one segment, no longer than a sliding window, attention is plainly causal.
    return sdpa_attention_forward(module, query, key, value, None, **how)[0].to(dtype)


def _varlen(query: Tensor, key: Tensor, value: Tensor, mask: Segments, scale: float | None) -> Tensor:
    """One row by the variable-length kernel, which computes no score between segments: → (1, T, heads, d)."""
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
    """Longest segment, in tokens, whose attention is plainly causal in every layer; 0 if that is unknown."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not kinds <= PLAIN_LAYERS or getattr(config, "attention_chunk_size", None):
        return 0
    return getattr(config, "sliding_window", None) or UNLIMITED


def takes_segments(model: PreTrainedModel) -> bool:
    """Whether the model's attention can be replaced by `segment_attention`."""
    return (
        model.config._attn_implementation == "sdpa"
        and model._can_set_attn_implementation()
        and longest_segment(model) > 0
    )


@contextmanager
def segments_understood(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model's layers accept `Segments` as the mask; other masks work as before."""
    before = model.config._attn_implementation
    set_attention(model, NAME)
    try:
        yield
    finally:
        set_attention(model, before)


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Sets how the layers that read text attend. Vision and audio towers keep their own way: they may have no
    other."""
    text = model.config.get_text_config()
    keys = [key for key in model.config.sub_configs if getattr(model.config, key, None) is text]
    model.set_attn_implementation(dict.fromkeys(["", *keys], name))
