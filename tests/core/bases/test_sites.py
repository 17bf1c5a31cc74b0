"""Which layers of a base can be adapted, and which are refused by name."""

import time
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from olora_core.bases.loading import Base, load_base
from olora_core.bases.sites import target_sites, unadapted
from olora_core.errors import SpecError
from olora_core.layers.adapter import attach
from olora_core.methods.lora import LoRAAdapter
from tests.tiny_base import make_gpt2, make_llama, save_base

LLAMA_LAYERS = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
]


def test_auto_takes_every_linear_layer_of_the_blocks_in_order(llama: Base) -> None:
    sites = target_sites(llama.model, "auto")
    assert [site.name for site in sites] == [f"model.layers.{i}.{n}" for i in (0, 1) for n in LLAMA_LAYERS]
    assert [site.layer_index for site in sites] == [0] * 7 + [1] * 7
    assert {(site.layer_count, site.kind) for site in sites} == {(2, "linear")}
    down = sites[6]
    assert (down.out_features, down.in_features) == (32, 48)
    assert target_sites(llama.model, "all-linear") == sites


def test_gpt2s_conv1d_layers_are_sites_with_their_true_shape(gpt2: Base) -> None:
    sites = {site.name: site for site in target_sites(gpt2.model, "auto")}
    assert len(sites) == 8
    site = sites["transformer.h.1.attn.c_attn"]
    assert (site.kind, site.layer_index, site.layer_count) == ("conv1d", 1, 2)
    assert (site.out_features, site.in_features) == (96, 32)


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (["q_proj", "v_proj"], 4),
        (["self_attn.o_proj"], 2),
        (["model.layers.1.mlp.up_proj"], 1),
        (r".*\.layers\.0\..*_proj", 7),
        (r"model\.layers\.1\.self_attn\.[qk]_proj", 2),
        (r".*layers\.0.*", None),
    ],
)
def test_names_match_as_in_peft(llama: Base, targets: str | list[str], count: int | None) -> None:
    if count is None:  # the norms of block 0 match as well
        with pytest.raises(SpecError, match=r"'model\.layers\.0\.input_layernorm'.*LlamaRMSNorm"):
            target_sites(llama.model, targets)
        return
    sites = target_sites(llama.model, targets)
    assert len(sites) == count
    assert sites == [site for site in target_sites(llama.model, "auto") if site in sites]


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        (["q_proj", "q_projj"], r"'q_projj' \(did you mean 'q_proj'\?\)\. Available: q_proj, .*lm_head"),
        (["proj"], "named 'proj'"),
        (["self_attn"], "named 'self_attn'.*Available"),
        ("q_proj", r"whole path.*give a list: \[\"q_proj\"\]"),
        (["embed_tokens"], "'model.embed_tokens'.*Embedding"),
        (["norm"], "'model.norm'.*LlamaRMSNorm"),
    ],
)
def test_what_cannot_be_adapted_is_refused_by_name(llama: Base, targets: str | list[str], says: str) -> None:
    with pytest.raises(SpecError, match=says) as caught:
        target_sites(llama.model, targets)
    assert caught.value.param == "adapter.target_modules"


def test_an_untied_lm_head_may_be_named(llama: Base) -> None:
    (site,) = target_sites(llama.model, ["lm_head"])
    assert (site.name, site.layer_index, site.layer_count) == ("lm_head", None, 0)


@pytest.mark.parametrize("make", [lambda: make_llama(tied=True), make_gpt2])
def test_a_tied_lm_head_is_refused_by_name(make) -> None:
    model = make()
    with pytest.raises(SpecError, match=r"'lm_head'.*tied to the token embedding"):
        target_sites(model, ["lm_head"])
    assert "lm_head" not in {site.name for site in target_sites(model, "auto")}


def test_a_convolution_is_refused_by_name(llama: Base) -> None:
    llama.model.model.layers[0].vision = nn.Conv2d(3, 3, 2)
    with pytest.raises(SpecError, match=r"'model\.layers\.0\.vision'.*Conv2d"):
        target_sites(llama.model, ["vision"])


def test_quantised_weights_are_refused_by_name(llama: Base) -> None:
    layer = llama.model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(torch.zeros(768, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(SpecError, match=r"'model\.layers\.0\.mlp\.up_proj'.*quantised"):
        target_sites(llama.model, ["up_proj"])


def test_fused_experts_are_refused_by_name_and_pointed_out(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=259,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    base = load_base(save_base(tmp_path, MixtralForCausalLM(config)), name="experts")
    names = unadapted(base.model)["experts"]
    assert [name.rpartition(".")[2] for name in names] == ["gate_up_proj", "down_proj"]
    assert "2 fused expert tensors (model.layers.0." in base.notes[0]
    with pytest.raises(SpecError, match=r"down_proj'.*several experts"):
        target_sites(base.model, ["q_proj", "down_proj"])
    found = {site.name.rpartition(".")[2] for site in target_sites(base.model, "auto")}
    assert found == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_a_model_that_bears_adapters_is_refused(llama: Base) -> None:
    name = "model.layers.0.self_attn.q_proj"
    attach(llama.model, {name: LoRAAdapter(torch.zeros(2, 32), torch.zeros(32, 2), scale=1.0)})
    with pytest.raises(ValueError, match="detach"):
        target_sites(llama.model, "auto")


def test_a_pattern_that_takes_for_ever_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_llama()
    monkeypatch.setattr("olora_core.bases.sites.MATCH_SECONDS", 0.01)
    started = time.monotonic()
    with pytest.raises(SpecError, match="takes too long"):
        target_sites(model, r"(.|\w|[a-z._0-9])+[0-9][0-9]")
    assert time.monotonic() - started < 5
