"""Which layers of a base can be adapted, and which are refused by name."""

import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, LoraModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    BartConfig,
    Gemma3Config,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    MixtralForCausalLM,
)

from olora_core.bases.loaders import MAMBA_FAMILIES, MAMBA_NAMES, why_not_loadable
from olora_core.bases.loading import Base, load_base
from olora_core.bases.sites import target_sites, unadapted
from olora_core.errors import SpecError
from olora_core.layers.adapter import attach
from olora_core.methods.lora import LoRAAdapter
from tests.tiny_base import VOCABULARY, make_gpt2, make_llama, save_base

from ..runs import Finished, chat_rows, one, spec_for, train, write_rows

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


# --- what loaders refuse -----------------------------------------------------------------------------------


@pytest.fixture
def mamba(tmp_path: Path) -> Base:
    config = MambaConfig(
        vocab_size=VOCABULARY, hidden_size=32, state_size=8, num_hidden_layers=2, time_step_rank=4
    )
    return load_base(save_base(tmp_path / "mamba", AutoModelForCausalLM.from_config(config)), name="mamba")


def test_layers_that_peft_refuses_are_left_out_with_the_reason(mamba: Base) -> None:
    names = [f"backbone.layers.{i}.mixer.out_proj" for i in (0, 1)]
    assert unadapted(mamba.model)["layers"] == names
    endings = {site.name.rpartition(".")[2] for site in target_sites(mamba.model, "auto")}
    assert endings == {"in_proj", "x_proj"}  # transformers takes dt_proj's weight without calling the layer
    assert any(note.startswith("2 layers (backbone.layers.0.mixer.out_proj,") for note in mamba.notes)
    with pytest.raises(SpecError, match=r"mixer\.out_proj'.*PEFT refuses 'out_proj' in a mamba"):
        target_sites(mamba.model, ["in_proj", "out_proj"])


class _Layers(nn.Module):
    """A model of a family, with linear layers of these names."""

    config = LlamaConfig(vocab_size=8, hidden_size=32, intermediate_size=8)

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(2, 2))


def test_the_table_of_refused_names_is_that_of_the_installed_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every family that transformers knows, and the names that its Mamba and attention layers have."""
    # PEFT asks by name before it makes a layer; making thousands of layers takes the time.
    monkeypatch.setattr(LoraModel, "_create_and_replace", lambda *arguments, **named: None)
    others = ("in_proj", "x_proj", "dt_proj", "o_proj", "q_proj", "fc1")
    refused, expected = set(), set()
    for family in CONFIG_MAPPING:
        for names in (("out_proj",), ("conv1d",), others):
            model = _Layers(names)
            model.config.model_type = family
            try:
                get_peft_model(model, LoraConfig(target_modules=[*names], r=1))
            except ValueError as error:
                assert "incompatible" in str(error)  # noqa: PT017
                refused.add((family, *names))
            if any(why_not_loadable(model, name) for name in names):
                expected.add((family, *names))
    assert refused == expected == {(family, name) for family in MAMBA_FAMILIES for name in MAMBA_NAMES}


# --- what text reaches -------------------------------------------------------------------------------------


def gemma3() -> Gemma3Config:
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return Gemma3Config(
        text_config={
            **text,
            "vocab_size": VOCABULARY + 5,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "sliding_window": 64,
            "pad_token_id": 0,
            "eos_token_id": 2,
            "bos_token_id": None,
            "max_position_embeddings": 128,
        },
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_id=VOCABULARY,
        boi_token_id=VOCABULARY + 1,
        eoi_token_id=VOCABULARY + 2,
    )


@pytest.fixture
def seeing(tmp_path: Path) -> Base:
    """A Gemma 3 with a vision tower, whose attention layers are named as the text model's."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(gemma3())
    return load_base(save_base(tmp_path / "seeing", model), name="seeing", dtype=torch.float32)


def test_auto_leaves_a_vision_tower_alone(seeing: Base) -> None:
    sites = target_sites(seeing.model, "auto")
    assert len(sites) == 2 * len(LLAMA_LAYERS)
    assert all(".language_model.layers." in site.name for site in sites)
    left = unadapted(seeing.model)["unreached"]
    assert len(left) == 6
    assert all(".vision_tower." in name for name in left)
    assert any("6 layers" in note and "not called when the model reads text" in note for note in seeing.notes)


@pytest.mark.parametrize("targets", [["q_proj", "o_proj"], r".*\.[qo]_proj"])
def test_a_name_of_both_towers_means_the_text_models_layers(seeing: Base, targets: list[str] | str) -> None:
    sites = target_sites(seeing.model, targets)
    assert len(sites) == 4
    assert all(".language_model.layers." in site.name for site in sites)


@pytest.mark.parametrize("targets", [["out_proj"], r".*vision_tower.*\.q_proj", ["q_proj", "fc1"]])
def test_a_name_of_the_vision_tower_alone_is_refused_with_the_reason(
    seeing: Base, targets: list[str] | str
) -> None:
    with pytest.raises(
        SpecError, match=r"vision_tower.*cannot be adapted: the model does not call it when it reads text"
    ):
        target_sites(seeing.model, targets)


def test_the_files_have_nothing_for_the_vision_tower(seeing: Base, tmp_path: Path) -> None:
    training = write_rows(tmp_path / "rows.jsonl", chat_rows(4))
    ran = list(train(spec_for(target_modules=["q_proj"]), seeing, training, None, tmp_path / "run"))
    tensors = load_file(one(Finished, ran).folder / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 3  # two blocks' q, and zeros for the k and v that servers fuse with it
    assert all(".language_model.layers." in name for name in tensors)


def test_attention_to_an_encoder_is_not_reached_by_text() -> None:
    config = BartConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
    )
    model = AutoModelForCausalLM.from_config(config)
    assert not any("encoder_attn" in site.name for site in target_sites(model, "auto"))
    assert all("encoder_attn" in name for name in unadapted(model)["unreached"])
    assert len(unadapted(model)["unreached"]) == 2 * 4


class _Experts(nn.Module):
    """Of four experts in a list, only the first is called."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts[0](x)


def test_an_expert_that_the_probe_did_not_choose_is_reached() -> None:
    model = make_llama()
    model.model.layers[1].mlp = _Experts(32)
    names = [site.name for site in target_sites(model, "auto") if "experts" in site.name]
    assert names == [f"model.layers.1.mlp.experts.{i}" for i in range(4)]


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
