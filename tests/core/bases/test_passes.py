"""How a base is run forward: packed rows by segment, and nothing else changed by it."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, MistralConfig

from olora_core.bases import attention
from olora_core.bases.attention import longest_segment, segment_attention, segments, segments_understood
from olora_core.bases.loading import Base
from olora_core.bases.passes import passes_of
from olora_core.data.batches import MicroBatch, micro_batches
from tests.tiny_base import VOCABULARY

from ..training.test_losses import examples_of

LENGTHS = (5, 1, 17, 9)


def packed(lengths: tuple[int, ...] = LENGTHS) -> MicroBatch:
    """One row; best fit lays the longest first."""
    everything = np.arange(len(lengths))
    (batch,) = micro_batches(
        examples_of(list(lengths), VOCABULARY), everything, size=99, tokens=999, packing=True, pad_token=0
    )
    return batch


@pytest.mark.parametrize("grouped", [1, 2])
def test_attention_by_segment_is_that_of_each_segment_alone(grouped: int) -> None:
    """Against softmax(q kᵀ / √d) v in float64, causal inside a segment and 0 across two."""
    heads, d, total = 4, 8, sum(LENGTHS)
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(1, heads, total, d, generator=draw, requires_grad=True)
    k, v = (torch.randn(1, heads // grouped, total, d, generator=draw, requires_grad=True) for _ in "kv")
    module = nn.Module()
    module.num_key_value_groups = grouped
    out, _ = segment_attention(module, q, k, v, segments(LENGTHS, q.device), scaling=d**-0.5)
    out.square().sum().backward()
    ours = [out, q.grad, k.grad, v.grad]

    q64, k64, v64 = (t.detach().double().requires_grad_() for t in (q, k, v))
    of = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    sees = (of[:, None] == of[None]) & torch.ones(total, total).tril().bool()
    scores = q64 @ k64.repeat_interleave(grouped, 1).transpose(2, 3) / d**0.5
    weights = scores.masked_fill(~sees, -torch.inf).softmax(-1)
    expected = (weights @ v64.repeat_interleave(grouped, 1)).transpose(1, 2)
    expected.square().sum().backward()
    for mine, reference in zip(ours, [expected, q64.grad, k64.grad, v64.grad], strict=True):
        assert torch.allclose(mine.double(), reference, rtol=1e-4, atol=1e-5)


def test_no_mask_over_the_whole_row_is_built(llama: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(module, query, key, value, attention_mask, **how):
        seen.append((query.shape[2], attention_mask))
        return plain(module, query, key, value, attention_mask, **how)

    plain = attention.sdpa_attention_forward
    monkeypatch.setattr(attention, "sdpa_attention_forward", spy)
    batch, passes = packed(), llama.passes
    with segments_understood(llama.model):
        seen.clear()
        passes.hidden(llama.model, batch)
    assert {length for length, _ in seen} == set(batch.segments) >= set(LENGTHS)
    assert all(mask is None for _, mask in seen)


def test_an_ordinary_row_is_computed_as_before_bit_for_bit(llama: Base, token_rows: torch.Tensor) -> None:
    with torch.no_grad():
        before = llama.model(token_rows).logits
        with segments_understood(llama.model):
            assert torch.equal(llama.model(token_rows).logits, before)
    assert llama.model.config._attn_implementation == "sdpa"


def test_a_segment_longer_than_the_sliding_window_goes_the_other_way() -> None:
    """A window of 8: within it our attention is exact, beyond it the window must still hold."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    passes = passes_of(model)
    assert (passes.packing, longest_segment(model)) == ("segments", 8)
    for lengths, by_segment in (((5, 8, 3), True), ((5, 9, 3), False)):
        batch = packed(lengths)
        with segments_understood(model), torch.no_grad():
            assert ("attention_mask" in passes.inputs(model, batch)) == by_segment
            got = passes.logits(model, batch)[1][0, : batch.tokens].split(batch.lengths)
            rows = batch.input_ids[0, : batch.tokens].split(batch.lengths)
            for row, logits in zip(rows, got, strict=True):
                alone = model(row[None], use_cache=False).logits[0]
                assert torch.allclose(logits, alone, rtol=1e-4, atol=1e-5)


def test_a_loaded_base_is_asked_once(llama: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = llama.passes
    monkeypatch.setattr(llama.model, "forward", None)
    assert llama.passes is asked
