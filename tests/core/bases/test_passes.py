"""How a base is run forward: packed rows by segment, and nothing else changed by it."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    DogeConfig,
    Mamba2Config,
    MistralConfig,
    MixtralConfig,
    ModernBertDecoderConfig,
    PreTrainedConfig,
    RobertaConfig,
    XLNetConfig,
)

from olora_core.bases import attention
from olora_core.bases.attention import longest_segment, segment_attention, segments, segments_understood
from olora_core.bases.loading import Base
from olora_core.bases.passes import looks_ahead, most_positions, passes_of, probe_tokens
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


def test_a_family_that_makes_masks_of_its_own_is_not_packed_by_segments() -> None:
    """Doge adds its own mask to the one that it is given, and cannot with a list of offsets."""
    model = model_of(DogeConfig(**SMALL, intermediate_size=48, keep_window_size=128), torch.float32)
    assert passes_of(model).packing == "positions"


def test_a_layer_that_is_called_decoder_is_none() -> None:
    """ModernBERT's is the LM head."""
    model = model_of(ModernBertDecoderConfig(**SMALL, intermediate_size=48, pad_token_id=0), torch.float32)
    assert isinstance(model.get_decoder(), nn.Linear)
    assert not passes_of(model).plain_head


def test_a_text_is_no_longer_than_the_positions_that_a_model_has() -> None:
    config = RobertaConfig(**SMALL, intermediate_size=48, is_decoder=True, max_position_embeddings=34)
    model = model_of(config, torch.float32)
    longest = most_positions(model)
    model(torch.full((1, longest), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, longest + 1), 5))


@pytest.mark.parametrize(("named", "expected"), [(128, 128), (-1, None)])
def test_a_limit_of_positions_that_is_none_is_unknown(llama: Base, named: int, expected: int | None) -> None:
    """XLNet's is -1."""
    llama.model.config.max_position_embeddings = named
    assert most_positions(llama.model) == expected


# --- in which direction a model reads ----------------------------------------------------------------------

SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
BERT = {**SMALL, "intermediate_size": 48}
EXPERTS = {**SMALL, "intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2}
ONE_WAY = {
    "BERT as a decoder": BertConfig(**BERT, is_decoder=True),
    "experts": MixtralConfig(**EXPERTS, num_key_value_heads=2),
    "a state": Mamba2Config(
        **{**SMALL, "num_attention_heads": None}, num_heads=8, head_dim=8, state_size=8, n_groups=1
    ),
}
BOTH_WAYS = {
    "BERT": BertConfig(**BERT, is_decoder=False),
    "XLNet": XLNetConfig(
        vocab_size=VOCABULARY, d_model=32, n_layer=2, n_head=4, d_inner=48, attn_type="bi", untie_r=True
    ),
}


def model_of(config: PreTrainedConfig, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).to(dtype).eval().requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*ONE_WAY, *BOTH_WAYS])
def test_a_model_that_looks_both_ways_is_found_whatever_its_dtype(name: str, dtype: torch.dtype) -> None:
    model = model_of((ONE_WAY | BOTH_WAYS)[name], dtype).train()
    assert looks_ahead(model) == (name in BOTH_WAYS)
    assert model.training


def logits_after_two_tokens(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """The first six tokens' logits, before two different later tokens."""
    ids = probe_tokens(model, 12)
    other = ids.clone()
    other[0, 6:] = ids[0, 6:].flip(0)
    with torch.no_grad():
        return model(ids).logits[:, :6], model(other).logits[:, :6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_leak_of_a_thousandth_is_found(llama: Base, dtype: torch.dtype) -> None:
    model = llama.model.to(dtype)

    def leak(module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        return output + 1e-3 * output.mean(dim=1, keepdim=True)

    assert not looks_ahead(model)
    model.model.layers[0].mlp.register_forward_hook(leak)
    assert looks_ahead(model)


def test_rounding_by_the_largest_input_is_no_leak(llama: Base) -> None:
    """As in LLM.int8: a later token changes earlier logits, but nothing can be learned from it."""

    def rounding(module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        step = output.detach().abs().max() / 127
        return output + ((output / step).round() * step - output).detach()

    llama.model.model.layers[0].mlp.register_forward_hook(rounding)
    before, after = logits_after_two_tokens(llama.model)
    assert float((before - after).abs().max()) > 1e-3 * float(before.abs().max())
    assert not looks_ahead(llama.model)


def test_a_token_that_loses_its_place_to_a_later_one_is_no_leak(llama: Base) -> None:
    """As with experts of a limited capacity: the layer serves the six tokens with the largest inputs."""

    def limited(module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        places = inputs[0].norm(dim=-1).topk(6, dim=1).indices
        served = torch.zeros(output.shape[:2], dtype=torch.bool).scatter(1, places, True)
        return output * served[..., None]

    llama.model.model.layers[1].mlp.register_forward_hook(limited)
    assert not looks_ahead(llama.model)
