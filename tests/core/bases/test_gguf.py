"""GGUF files: dequantised exactly, with their tokenizer, or refused with a sentence."""

import json
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFEndian, GGUFWriter
from gguf.constants import Keys
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from olora_core.bases.gguf import dequantise, read_header
from olora_core.bases.loading import load_base
from olora_core.bases.room import check_room
from olora_core.errors import ModelError
from tests import gguf_files, small_disk
from tests.gguf_files import Type

TEXTS = (
    "Hello world! 123",
    "def f(x):\n    return x ** 2  # 4,5",
    "  two  spaces\tand\r\n\r\nlines ",
    "Für 🙂 dich, und 日本語 ½ ²³!",
    "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
    "it's 'twas I'LL",
)
MESSAGES = [{"role": "user", "content": "Why 42?"}, {"role": "assistant", "content": "Because."}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    return tmp_path / "base"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the commonest kind; tests only read it."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.Q4_1.gguf"
    return gguf_files.write(path, gguf_files.make("llama"), Type.Q4_1)


def refusal(path: Path, folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        dequantise(path, folder)
    message = caught.value.message
    assert "\n" not in message
    assert str(path.parent) not in message
    return message


# --- weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_1])
def test_the_weights_are_those_that_gguf_itself_dequantises(tmp_path: Path, folder: Path, kind: Type) -> None:
    model = gguf_files.make("llama")
    made = dequantise(gguf_files.write(tmp_path / "tiny.gguf", model, kind), folder)
    assert (made.header.architecture, made.header.quantisation) == ("llama", kind.name)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    expected = gguf_files.rounded(model, kind)
    assert loaded.keys() == expected.keys()
    for name, value in expected.items():
        assert np.array_equal(loaded[name].float().numpy(), value), name


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_logits_are_the_models(tmp_path: Path, folder: Path, architecture: str, tied: bool) -> None:
    head = {"head_dim": 128} if architecture == "qwen3" else {}  # as all Qwen3s have it; GGUFs do not say
    model = gguf_files.make(architecture, tied=tied, **head)
    dequantise(gguf_files.write(tmp_path / "tiny.gguf", model), folder)
    base = load_base(folder, name="tiny")
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        assert torch.equal(base.model(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("kind", "rounds", "dtype"),
    [
        (Type.BF16, True, "bfloat16"),
        (Type.F32, True, "bfloat16"),
        (Type.F32, False, "float32"),
        (Type.F16, False, "float32"),
        (Type.Q8_0, True, "float32"),
    ],
)
def test_the_dtype_loses_no_value(tmp_path: Path, folder: Path, kind: Type, rounds: bool, dtype: str) -> None:
    """`rounds`: all values have at most bf16's 8 bits."""
    model = gguf_files.make("llama")
    if rounds:
        model = model.bfloat16().float()
    made = dequantise(gguf_files.write(tmp_path / "tiny.gguf", model, kind), folder)
    base = load_base(folder, name="tiny")
    assert (made.dtype, str(base.dtype)) == (dtype, f"torch.{dtype}")


def test_the_config_is_the_models(tmp_path: Path, folder: Path) -> None:
    model = gguf_files.make(
        "llama", rms_norm_eps=3e-5, rope_parameters={"rope_type": "default", "rope_theta": 5e5}
    )
    dequantise(gguf_files.write(tmp_path / "tiny.gguf", model), folder)
    config = load_base(folder, name="tiny").model.config
    assert not hasattr(config, "quantization_config")
    assert "tiny" not in (folder / "config.json").read_text(), "the file's name for itself"
    assert config.rms_norm_eps == pytest.approx(3e-5)
    assert config.rope_parameters["rope_theta"] == 5e5
    assert (config.num_key_value_heads, config.max_position_embeddings) == (2, 128)
    assert sorted(path.name for path in folder.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


# --- tokenizer ---------------------------------------------------------------------------------------------


def test_the_tokenizer_survives_with_its_template(whole: Path, folder: Path) -> None:
    dequantise(whole, folder)
    before, after = gguf_files.tokenizer(), AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert after(text).input_ids == before(text).input_ids, text
        assert after.decode(after(text).input_ids) == text
    assert after.apply_chat_template(MESSAGES) == before.apply_chat_template(MESSAGES)
    assert (after.eos_token_id, after.pad_token_id, after.bos_token_id) == (2, 0, None)
    assert set(after.all_special_ids) == set(before.all_special_ids)
    assert after.get_vocab() == before.get_vocab()
    assert set(after(TEXTS[0])) == {"input_ids", "attention_mask"}
    saved = json.loads((folder / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert saved["additional_special_tokens"] == ["<|im_start|>"]
    assert saved["model_max_length"] == 128


def test_numbers_are_split_into_digits_where_the_file_says_so(tmp_path: Path, folder: Path) -> None:
    """`smollm`: llama.cpp isolates each digit before it splits as GPT-2 does."""
    dequantise(gguf_files.write(tmp_path / "t.gguf", gguf_files.make("llama"), pre="smollm"), folder)
    after = AutoTokenizer.from_pretrained(folder)
    expected = gguf_files.tokenizer()
    expected.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    for text in TEXTS:
        assert after(text).input_ids == expected(text).input_ids, text
    tokens = after.convert_ids_to_tokens(after("in 2025").input_ids)
    assert tokens[-5:] == ["Ġ", "2", "0", "2", "5"]


def test_a_file_beside_others_takes_nothing_from_them(whole: Path, folder: Path, tmp_path: Path) -> None:
    crowded = tmp_path / "crowded"
    crowded.mkdir()
    path = Path(shutil.copy(whole, crowded / "a model (1).gguf"))
    (crowded / "config.json").write_text('{"model_type": "gpt2"}')
    (crowded / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "eos_token": "x"}')
    (crowded / "adapter_config.json").write_text("{}")
    dequantise(path, folder)
    assert load_base(folder, name="t").model.config.model_type == "llama"
    assert AutoTokenizer.from_pretrained(folder).eos_token == "<|im_end|>"


@pytest.mark.parametrize("pre", ["default", "deepseek-llm", "of-tomorrow"])
def test_rules_of_splitting_that_are_not_known_are_refused(tmp_path: Path, folder: Path, pre: str) -> None:
    path = gguf_files.write(tmp_path / "t.gguf", gguf_files.make("llama"), pre=pre)
    assert f"splits text by the rules '{pre}'" in refusal(path, folder)


# --- what is refused ---------------------------------------------------------------------------------------


def test_a_truncated_file_is_refused_wherever_it_ends(whole: Path, folder: Path, tmp_path: Path) -> None:
    content = whole.read_bytes()
    names = content.index(b"blk.0.attn_q.weight"), content.index(b"tokenizer.ggml.merges")
    ends = [0, 3, 4, 6, 20, 24, 30, 100, *names, names[0] + 25, len(content) // 2, len(content) - 1]
    for end in ends:
        path = tmp_path / "cut.gguf"
        path.write_bytes(content[:end])
        sentence = refusal(path, folder)
        assert "copied whole" in sentence or "not a GGUF file" in sentence, end
        assert list(folder.iterdir()) == []


def test_a_damaged_header_is_refused(whole: Path, folder: Path, tmp_path: Path) -> None:
    content = whole.read_bytes()
    for place, value in ((4, b"\xff" * 4), (8, b"\xff" * 7), (16, b"\xff" * 7), (24, b"\xff" * 7)):
        path = tmp_path / "damaged.gguf"
        path.write_bytes(content[:place] + value + content[place + len(value) :])
        assert "copied whole" in refusal(path, folder), place


def test_weights_that_are_not_numbers_are_refused(tmp_path: Path, folder: Path) -> None:
    model = gguf_files.make("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    path = gguf_files.write(tmp_path / "t.gguf", model)
    assert "not numbers" in refusal(path, folder)


def test_another_file_is_no_gguf(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "t.gguf"
    path.write_bytes(b"PK\x03\x04 a zip file")
    assert "not a GGUF file" in refusal(path, folder)


@pytest.mark.parametrize("raw", [99, 4, 31])
def test_an_unknown_quantisation_is_named(whole: Path, folder: Path, tmp_path: Path, raw: int) -> None:
    """4 and 31 are types that gguf once had, 99 one that it may have tomorrow."""
    content = bytearray(whole.read_bytes())
    place = content.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 2 * 8
    assert struct.unpack_from("<I", content, place) == (Type.Q4_1.value,)
    struct.pack_into("<I", content, place, raw)
    path = tmp_path / "t.gguf"
    path.write_bytes(content)
    sentence = refusal(path, folder)
    assert f"tensors of type {raw}" in sentence
    assert "another quantisation" in sentence


def test_a_quantisation_without_dequantisation_is_named(tmp_path: Path, folder: Path) -> None:
    def integers(writer: GGUFWriter) -> None:
        writer.add_tensor("extra.weight", np.zeros(8, np.int32))

    path = gguf_files.write(tmp_path / "t.gguf", gguf_files.make("llama"), change=integers)
    assert "tensors of type I32, which cannot be dequantised" in refusal(path, folder)


def test_an_unknown_architecture_is_named(tmp_path: Path, folder: Path) -> None:
    path = gguf_files.write(tmp_path / "t.gguf", gguf_files.make("llama"), architecture="wavenet")
    assert "architecture 'wavenet'" in refusal(path, folder)


def drop(name: str) -> Callable[[dict[str, np.ndarray]], None]:
    return lambda tensors: tensors.__delitem__(name)


def test_a_file_that_lacks_a_weight_is_refused(tmp_path: Path, folder: Path) -> None:
    path = gguf_files.write(
        tmp_path / "t.gguf", gguf_files.make("llama"), tensors=drop("blk.1.ffn_up.weight")
    )
    assert "lacks the weights model.layers.1.mlp.up_proj.weight" in refusal(path, folder)


def test_a_weight_that_the_model_would_not_have_is_refused(tmp_path: Path, folder: Path) -> None:
    def bias(tensors: dict[str, np.ndarray]) -> None:
        tensors["blk.0.attn_q.bias"] = np.ones(gguf_files.WIDTH, np.float32)

    path = gguf_files.write(tmp_path / "t.gguf", gguf_files.make("llama"), tensors=bias)
    assert "would not compute the same" in refusal(path, folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: w.add_tensor("rope_freqs.weight", np.ones(8, np.float32)), "rope_freqs.weight"),
        (lambda w: w.add_string("llama.rope.scaling.type", "yarn"), "yarn"),
        (lambda w: w.add_type("adapter"), "'adapter'"),
        (lambda w: w.add_uint16(Keys.Split.LLM_KV_SPLIT_COUNT, 3), "one of 3 parts"),
    ],
)
def test_what_transformers_would_leave_out_is_refused(
    tmp_path: Path, folder: Path, change: Callable[[GGUFWriter], None], says: str
) -> None:
    path = gguf_files.write(tmp_path / "t.gguf", gguf_files.make("llama"), change=change)
    assert says in refusal(path, folder)


def test_a_vocabulary_without_a_model_is_refused(tmp_path: Path, folder: Path) -> None:
    path = gguf_files.write(tmp_path / "t.gguf", gguf_files.make("llama"), tensors=dict.clear)
    assert "holds no weights" in refusal(path, folder)


def test_the_other_byte_order_is_refused(tmp_path: Path, folder: Path) -> None:
    path = gguf_files.write(tmp_path / "t.gguf", gguf_files.make("llama"), endian=GGUFEndian.BIG)
    assert "byte order" in refusal(path, folder)


# --- the disk ----------------------------------------------------------------------------------------------


def test_room_is_checked_before_anything_is_written(whole: Path, folder: Path) -> None:
    header = read_header(whole)
    assert header.most_bytes == 4 * sum(p.numel() for p in gguf_files.make("llama").parameters())
    check_room(folder, header.most_bytes)
    with pytest.raises(ModelError, match=r"need up to 1000000\.00 GB.*OLORA_HOME") as caught:
        check_room(folder, 10**15)
    assert caught.value.code == "disk_full"


FILL = """
import sys
import torch
from safetensors.torch import save_file
from olora_core.bases.room import full_disk
with full_disk():
    if sys.argv[1] == "safetensors":
        save_file({"w": torch.zeros(2**20)}, "w.safetensors")
    else:
        open("w", "wb").write(b"0" * 2**22)
"""


@pytest.mark.parametrize("by", ["safetensors", "a file"])
def test_a_disk_that_fills_up_is_a_sentence(folder: Path, by: str) -> None:
    done = small_disk.run(folder, 2**20, [sys.executable, "-c", FILL, by], cwd=folder)
    assert done.returncode == 1
    assert "ModelError: The disk is full; free some space, or set OLORA_HOME" in done.stderr
