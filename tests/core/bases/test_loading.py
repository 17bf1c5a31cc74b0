"""Loading a base from a folder."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertLMHeadModel, PreTrainedTokenizerFast

from olora_core.bases.loading import Base, load_base
from olora_core.bases.precision import compute_dtype
from olora_core.errors import DataError, ModelError
from olora_core.progress import result_of
from olora_core.specs import read_spec
from olora_core.training.data import read_data
from olora_core.training.samples import generate
from tests.families.configs import tiny_config
from tests.tiny_base import END, VOCABULARY, make_llama, make_tokenizer, save_base

from ..loaded_bases import fresh_base


@pytest.fixture
def llama(base_folders: dict[str, Path]) -> Base:
    """Loaded, not copied: this file is about loading."""
    return load_base(base_folders["llama"], name="tiny-llama")


@pytest.fixture
def bf16_llama(base_folders: dict[str, Path]) -> Base:
    return load_base(base_folders["llama-bf16"], name="tiny-llama-bf16")


@pytest.fixture
def folder(base_folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the Llama's folder, to be spoilt."""
    return Path(shutil.copytree(base_folders["llama"], tmp_path / "base"))


def test_a_base_is_loaded_frozen_in_eval_mode_and_its_own_dtype(llama: Base, bf16_llama: Base) -> None:
    assert (llama.dtype, bf16_llama.dtype) == (torch.float32, torch.bfloat16)
    assert not any(parameter.requires_grad for parameter in llama.model.parameters())
    assert not llama.model.training
    assert llama.notes == []
    original = make_llama().state_dict()
    loaded = llama.model.state_dict()
    assert all(torch.equal(loaded[name], original[name]) for name in original)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "llama-bf16", "gpt2"])
def test_the_copies_that_other_tests_get_are_as_loaded(
    base_folders: dict[str, Path], token_rows: torch.Tensor, name: str
) -> None:
    loaded, copied = load_base(base_folders[name], name="tiny"), fresh_base(base_folders[name])
    plain = [(base.name, base.dtype, base.end_tokens, base.padding, base.notes) for base in (loaded, copied)]
    assert plain[0] == plain[1]
    expected, found = (dict(base.model.named_parameters()) for base in (loaded, copied))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert torch.equal(copied.model(token_rows).logits, loaded.model(token_rows).logits)
    with torch.no_grad():
        for parameter in copied.model.parameters():
            parameter.zero_()
    again = fresh_base(base_folders[name]).model.named_parameters()
    assert all(torch.equal(expected[key], parameter) for key, parameter in again)


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
    assert note.startswith("9 tensors of the checkpoint are not used by the model: model.layers.1.")


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


def with_more_tokens(folder: Path, **tokens: str) -> Base:
    """The base, with two tokens in its tokenizer that it has no embedding for, as Gemma 3 1B has one."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<image>", "<audio>"], special_tokens=True)
    for name, token in tokens.items():
        setattr(tokenizer, name, token)
    tokenizer.save_pretrained(folder)
    return load_base(folder, name="m")


def test_tokens_that_the_model_does_not_embed_are_pointed_out(folder: Path) -> None:
    base = with_more_tokens(folder)
    assert base.embedded_tokens == VOCABULARY
    assert base.notes == [
        "The model embeds 259 tokens, and its tokenizer has 2 more ('<image>', '<audio>'); a row that "
        "contains one is refused."
    ]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "It is", "completion": " an <audio>."},
        {"text": "An <audio>."},
    ],
)
def test_a_row_with_a_token_that_the_model_does_not_embed_is_refused_with_its_line(
    folder: Path, tmp_path: Path, row: dict
) -> None:
    base = with_more_tokens(folder)
    fitting = json.loads(json.dumps(row).replace("<audio>", "<sound>"))
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(fitting)}\n{json.dumps(row)}\n")
    spec = read_spec(model="m", type="supervised")
    says = r"Line 2 of the training file contains token 260 \('<audio>'\), and the base model embeds only 259"
    with pytest.raises(DataError, match=says) as refused:
        result_of(read_data(spec, base, path, None))
    assert refused.value.param == "training_file"


def test_a_prompt_with_such_a_token_is_refused(folder: Path) -> None:
    base = with_more_tokens(folder)
    with pytest.raises(ModelError, match=r"prompt contains token 259 \('<image>'\).*embeds only 259 tokens"):
        generate(base, [{"role": "user", "content": "What is <image>?"}], 4)


def test_padding_and_ends_are_tokens_that_the_model_embeds(folder: Path) -> None:
    base = with_more_tokens(folder, pad_token="<image>", eos_token="<audio>")
    assert base.tokenizer.pad_token == "<|pad|>"
    assert base.end_tokens == {base.tokenizer.convert_tokens_to_ids(END)}
    (note,) = [note for note in base.notes if "padding" in note]
    assert "no padding token that the model embeds; '<|pad|>'" in note


def test_rows_are_padded_with_a_token_whose_embedding_is_not_zero(folder: Path) -> None:
    """A row that begins with zeros may have no gradient: Gemma 3n's standard deviation of them."""
    assert load_base(folder, name="m").padding == 2  # the end; transformers makes padding's embedding zero
    model = make_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = 0.1
    model.save_pretrained(folder)
    assert load_base(folder, name="m").padding == 0


@pytest.mark.parametrize("family", ["cpmant", "prophetnet"])
def test_a_family_that_padding_changes_is_refused(tmp_path: Path, family: str) -> None:
    model = AutoModelForCausalLM.from_config(tiny_config(family)).eval()
    with torch.no_grad():
        ids = torch.arange(5, 17)[None]
        alone = model(ids, use_cache=False).logits
        padded = model(nn.functional.pad(ids, (0, 6)), use_cache=False).logits[:, :12]
    assert float((alone - padded).abs().max()) > 1e-3 * float(alone.abs().max())
    with pytest.raises(ModelError, match=rf"'m' \({type(model).__name__}\) cannot be trained: .*padd"):
        load_base(save_base(tmp_path, model), name="m")


BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def test_a_model_that_looks_both_ways_is_refused_with_what_to_do(tmp_path: Path) -> None:
    for is_decoder in (True, False):
        config = BertConfig(vocab_size=VOCABULARY, is_decoder=is_decoder, **BERT)
        save_base(tmp_path, BertLMHeadModel(config).eval())
        if is_decoder:
            load_base(tmp_path, name="m")
    says = r"'m' \(BertLMHeadModel\) is not causal: .*predict the next token, or set is_decoder to true"
    with pytest.raises(ModelError, match=says) as refused:
        load_base(tmp_path, name="m")
    assert refused.value.param == "model"


def test_a_model_that_needs_more_than_text_is_refused_with_the_reason(folder: Path, monkeypatch) -> None:
    def forward(self, input_ids, pixel_values, **others):
        raise AssertionError

    monkeypatch.setattr("transformers.LlamaForCausalLM.forward", forward)
    says = r"'m' \(LlamaForCausalLM\) does not compute logits of text alone \(.*'pixel_values'\)"
    with pytest.raises(ModelError, match=says):
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


def test_an_error_tells_nothing_of_where_the_folder_lies(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    for content, words in (("{", "not JSON"), (json.dumps(config | {"model_type": "klingon"}), "klingon")):
        (folder / "config.json").write_text(content)
        with pytest.raises(ModelError, match=words) as refused:
            compute_dtype(read_spec(model="m"), folder)
        assert str(folder.parent) not in refused.value.message
        assert "\n" not in refused.value.message
        assert refused.value.param == "model"
