"""Loading a base from a folder, and finding the layers to adapt."""

import hashlib
import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from olora_core.bases.loading import Base, load_base
from olora_core.bases.precision import compute_dtype
from olora_core.bases.sites import left_out, target_sites
from olora_core.errors import ModelError, SpecError
from olora_core.layers.adapter import attach
from olora_core.methods.lora import LoRAAdapter
from olora_core.specs import read_spec

from .conftest import END, make_gpt2, make_llama, make_tokenizer, save_base

LLAMA_LAYERS = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
]


@pytest.fixture
def folder(base_folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the Llama's folder, to be spoilt."""
    return Path(shutil.copytree(base_folders["llama"], tmp_path / "base"))


# --- loading -----------------------------------------------------------------------------------------------


def test_a_base_is_loaded_frozen_in_eval_mode_and_its_own_dtype(llama: Base, bf16_llama: Base) -> None:
    assert (llama.dtype, bf16_llama.dtype) == (torch.float32, torch.bfloat16)
    assert not any(parameter.requires_grad for parameter in llama.model.parameters())
    assert not llama.model.training
    assert llama.notes == []
    original = make_llama().state_dict()
    loaded = llama.model.state_dict()
    assert all(torch.equal(loaded[name], original[name]) for name in original)


def test_another_dtype_can_be_asked_for(base_folders: dict[str, Path]) -> None:
    base = load_base(base_folders["llama-bf16"], name="x", dtype=torch.float32)
    assert base.dtype == torch.float32
    assert {p.dtype for p in base.model.parameters()} == {torch.float32}


def test_the_fingerprint_is_that_of_the_weights(llama: Base, tied_llama: Base, folder: Path) -> None:
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    listing = f"{digest}  model.safetensors\n"
    assert llama.fingerprint == hashlib.sha256(listing.encode()).hexdigest()
    (folder / "generation_config.json").unlink()
    assert load_base(folder, name="elsewhere").fingerprint == llama.fingerprint
    assert tied_llama.fingerprint != llama.fingerprint


def test_a_sharded_checkpoint_is_loaded_and_a_missing_shard_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    make_llama().save_pretrained(folder, max_shard_size="40KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    base = load_base(folder, name="sharded")
    assert torch.equal(base.model.lm_head.weight, make_llama().lm_head.weight)
    shards[0].unlink()
    with pytest.raises(ModelError, match=shards[0].name):
        load_base(folder, name="sharded")


def test_a_missing_folder_and_a_missing_config_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="its folder does not exist"):
        load_base(tmp_path / "nowhere", name="m")
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load_base(folder, name="m")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds an adapter"):
        load_base(folder, name="m")


def test_pickled_weights_are_refused_with_their_name_and_never_opened(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no model\.safetensors .*none is there"):
        load_base(folder, name="m")
    (folder / "pytorch_model.bin").write_bytes(b"cposix\nsystem\n")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is a pickle.*save_pretrained"):
        load_base(folder, name="m")


def test_truncated_weights_are_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    for keep in (weights.stat().st_size // 2, 4, 0):
        weights.write_bytes(weights.read_bytes()[:keep])
        with pytest.raises(ModelError, match=r"model\.safetensors of base model 'm' cannot be read"):
            load_base(folder, name="m")


def test_weights_that_lack_a_layer_are_refused_not_filled_with_random_numbers(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3, "layer_types": None}))
    with pytest.raises(ModelError, match=r"lack model\.layers\.2\..* and 5 more"):
        load_base(folder, name="m")


def test_weights_that_the_model_does_not_use_are_pointed_out(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1, "layer_types": None}))
    (note,) = load_base(folder, name="m").notes
    assert note.startswith("9 tensors of the checkpoint have no place in the model: model.layers.1.")


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    with pytest.raises(ModelError, match="'m'"):
        load_base(folder, name="m")


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "no_such_architecture"},
        {"model_type": "vit"},
        {"model_type": "custom", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.M"}},
        {"transformers_weights": "adapter_model.bin"},
        {"attn_implementation": "someone/kernel"},
    ],
)
def test_unknown_architectures_and_foreign_code_are_refused(folder: Path, change: dict) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    (folder / "code.py").write_text("raise SystemExit('foreign code ran')")
    with pytest.raises(ModelError, match="'m'"):
        load_base(folder, name="m")


def test_a_config_that_is_not_json_is_refused(folder: Path) -> None:
    for text in ("{", "[]", "\x00"):
        (folder / "config.json").write_text(text)
        with pytest.raises(ModelError, match=r"config\.json of base model 'm' is not"):
            load_base(folder, name="m")


def test_a_missing_or_broken_tokenizer_is_named(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="tokenizer of base model 'm' cannot be loaded"):
        load_base(folder, name="m")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match=r"no tokenizer; .*tokenizer\.json"):
        load_base(folder, name="m")


def test_a_tokenizer_of_another_model_is_refused(folder: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["one-more"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match="token 259, but the model embeds 259 tokens"):
        load_base(folder, name="m")


def without_padding(**tokens: str) -> PreTrainedTokenizerFast:
    core = make_tokenizer().backend_tokenizer
    return PreTrainedTokenizerFast(tokenizer_object=core, **tokens)


def test_a_missing_pad_token_is_adopted_from_the_tokenizers_own_and_noted(folder: Path) -> None:
    without_padding(eos_token=END).save_pretrained(folder)
    base = load_base(folder, name="m")
    assert base.tokenizer.pad_token == "<|pad|>"
    assert base.tokenizer.pad_token_id != base.tokenizer.eos_token_id
    assert len(base.tokenizer) == 259
    assert "'<|pad|>'" in base.notes[0]


def test_an_end_token_that_has_to_pad_is_pointed_out(folder: Path) -> None:
    without_padding(eos_token="<|pad|>").save_pretrained(folder)
    base = load_base(folder, name="m")
    assert base.tokenizer.pad_token_id == base.tokenizer.eos_token_id
    assert "also its end-of-text token" in base.notes[0]


# --- the layers to adapt -----------------------------------------------------------------------------------


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
    names = left_out(base.model)["experts"]
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


def test_an_error_tells_nothing_of_where_the_folder_lies(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    for content, words in (("{", "not JSON"), (json.dumps(config | {"model_type": "klingon"}), "klingon")):
        (folder / "config.json").write_text(content)
        with pytest.raises(ModelError, match=words) as refused:
            compute_dtype(read_spec(model="m"), folder)
        assert str(folder.parent) not in refused.value.message
        assert "\n" not in refused.value.message
        assert refused.value.param == "model"


def test_a_pattern_that_takes_for_ever_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_llama()
    monkeypatch.setattr("olora_core.bases.sites.MATCH_SECONDS", 0.01)
    started = time.monotonic()
    with pytest.raises(SpecError, match="takes too long"):
        target_sites(model, r"(.|\w|[a-z._0-9])+[0-9][0-9]")
    assert time.monotonic() - started < 5
