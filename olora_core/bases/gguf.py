"""GGUF files as base models: dequantised once, into a folder of safetensors that loads like any other.

transformers reads the file. What it would leave out or guess without a word is refused here, because the
folder would not compute what the file's model does.
"""

import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers import __version__ as transformers_version
from transformers.utils.quantization_config import GgufConfig

from ..errors import ModelError, shortened
from .loading import load_base, no_progress_bar
from .room import check_room, full_disk

if TYPE_CHECKING:
    from gguf import GGUFReader

MAGIC = b"GGUF"
SCALED_ROTARY = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that change the rotary positions; transformers does not read them."""
SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
"""llama.cpp's names of the pre-tokenizer that makes each digit a word, and then splits as GPT-2 does."""
AS_GPT2 = ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion")
"""llama.cpp's names of GPT-2's pre-tokenizer, which transformers takes where it knows no other."""
WHOLE_WORDS_FIRST = ("llama3", "llama-v3", "llama-bpe", "falcon3", "tekken")
"""Tokenizers that take a word of the vocabulary as it is, without its merges."""
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
STORED = (torch.bfloat16, torch.float32)
"""Not fp16, in whose range training overflows."""


@dataclass(frozen=True)
class Header:
    """What a GGUF file says of itself."""

    architecture: str
    quantisation: str
    """The type that holds most values, such as `Q4_1`."""
    parameters: int
    """Number of values in its tensors."""
    context: int | None
    """Number of tokens that the model reads at most."""
    tokens: int
    """Number of tokens in its vocabulary."""
    pre_tokenizer: str | None
    """Name of the rules that split text into words, of a byte-level BPE; None for other tokenizers."""

    @property
    def most_bytes(self) -> int:
        """Size of the dequantised weights, at most."""
        return 4 * self.parameters


@dataclass(frozen=True)
class Dequantised:
    """A GGUF file's model in a folder."""

    header: Header
    dtype: str


def dequantise(path: Path, folder: Path) -> Dequantised:
    """Writes the model in a GGUF file as config.json, safetensors and tokenizer into `folder`, an empty one.

    The weights are stored in bf16 if that holds each dequantised value exactly, as it does for files in BF16,
    and in fp32 otherwise. Raises ModelError, and then the folder may hold half of the files.
    """
    header = read_header(path)
    check_room(folder, header.most_bytes)
    with _alone(path) as (where, file):
        config = _config(where, file, path.name, header)
        tokenizer = _tokenizer(where, file, path.name, header)
        model = _model(where, file, path.name, config)
    _check_complete(model, path.name, header)
    dtype = next(dtype for dtype in STORED if _holds(model, dtype))
    with full_disk(), no_progress_bar():
        _plain(model.to(dtype)).save_pretrained(folder)
        _save_tokenizer(tokenizer, folder)
    del model
    load_base(folder, name=path.name)
    return Dequantised(header, str(dtype).removeprefix("torch."))


# --- the file ----------------------------------------------------------------------------------------------


def read_header(path: Path) -> Header:
    """Reads a GGUF file's header and checks that its tensors are all there.

    Raises ModelError for a file that is damaged, or that holds no whole model which transformers can read.
    """
    reader = _open(path)
    architecture = _field(reader, "general.architecture")
    if not isinstance(architecture, str):
        raise ModelError(f"{path.name} does not name its architecture; {_AGAIN}.")
    if reason := _not_a_model(reader):
        raise ModelError(f"{path.name} {reason}.")
    types = Counter[str]()
    for tensor in reader.tensors:
        types[_known_type(path.name, tensor.tensor_type)] += tensor.n_elements
    if reason := _scaled_rotary(reader, architecture):
        raise ModelError(
            f"{path.name} scales its rotary positions ({reason}), which transformers does not read from a "
            "GGUF file; add the model as a folder or by its hub id instead."
        )
    pre = _field(reader, "tokenizer.ggml.pre") or "default"
    byte_level = _field(reader, "tokenizer.ggml.model") == "gpt2"
    return Header(
        architecture=architecture,
        quantisation=types.most_common(1)[0][0],
        parameters=types.total(),
        context=_field(reader, f"{architecture}.context_length"),
        tokens=len(_field(reader, "tokenizer.ggml.tokens") or ()),
        pre_tokenizer=pre if byte_level else None,
    )


_AGAIN = "it is damaged or was not copied whole, so copy or download it again"


def _open(path: Path) -> "GGUFReader":
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ModelError("GGUF files need the package gguf; install it with `pip install gguf`.") from None
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ModelError(f"{path.name} is not a GGUF file: it does not begin with 'GGUF'.")
    try:
        return GGUFReader(path)
    except OSError:
        raise
    except Exception as error:  # a damaged file can raise anything
        if unknown := re.match(r"\D*\d*\D*?(\d+)\)? is not a valid GGMLQuantizationType", str(error)):
            raise ModelError(
                f"{path.name} holds tensors of type {unknown[1]}, which the installed gguf does "
                "not know; update the package gguf, or use a file of another quantisation."
            ) from None
        raise ModelError(f"{path.name} cannot be read; {_AGAIN}.") from error


def _field(reader: "GGUFReader", key: str) -> Any:
    """A metadata value; None if it is not there."""
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _not_a_model(reader: "GGUFReader") -> str | None:
    """Why the file does not hold a whole model, with the remedy; None if it does."""
    kind, parts = _field(reader, "general.type"), _field(reader, "split.count")
    if kind not in (None, "model"):
        return f"holds no model but is of the type '{kind}'; use the model's own file"
    if parts is not None and parts > 1:
        return f"is one of {parts} parts; merge them with `llama-gguf-split --merge`"
    if reader.byte_order != "I":
        return "is of the other byte order; convert it with `gguf-convert-endian`"
    if not reader.tensors:
        return "holds no weights; use the model's own file"
    return None


def _known_type(name: str, kind: Any) -> str:
    """The name of a tensor type that can be dequantised. Raises ModelError for others."""
    from gguf.constants import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    try:
        dequantize(np.zeros(GGML_QUANT_SIZES[kind][1], np.uint8), kind)
    except (NotImplementedError, KeyError):
        raise ModelError(
            f"{name} holds tensors of type {kind.name}, which cannot be dequantised; use a file of another "
            "quantisation, such as Q8_0."
        ) from None
    return str(kind.name)


def _scaled_rotary(reader: "GGUFReader", architecture: str) -> str | None:
    tensors = [tensor.name for tensor in reader.tensors if tensor.name in SCALED_ROTARY]
    kind = _field(reader, f"{architecture}.rope.scaling.type")
    return tensors[0] if tensors else kind if kind not in (None, "none") else None


# --- what transformers makes of it -------------------------------------------------------------------------


@contextmanager
def _alone(path: Path) -> Iterator[tuple[str, str]]:
    """A folder with nothing but the file, and its name there: transformers also reads what lies beside it."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model.gguf").symlink_to(path.resolve())
        yield folder, "model.gguf"


def _config(where: str, file: str, name: str, header: Header) -> Any:
    try:
        return AutoConfig.from_pretrained(where, gguf_file=file, local_files_only=True)
    except Exception as error:
        raise ModelError(
            f"{name} is of the architecture '{header.architecture}', which transformers "
            f"{transformers_version} cannot read from a GGUF file ({_first_line(error)}); add the model as a "
            "folder or by its hub id instead."
        ) from error


def _tokenizer(where: str, file: str, name: str, header: Header) -> PreTrainedTokenizerFast:
    """The file's tokenizer, with its chat template, that splits text as llama.cpp does."""
    try:
        read = PreTrainedTokenizerFast.from_pretrained(where, gguf_file=file, local_files_only=True)
    except Exception as error:
        raise ModelError(
            f"The tokenizer in {name} cannot be read ({_first_line(error)}); add the model as a folder or by "
            "its hub id instead."
        ) from error
    tokenizer = _without_extra_tokens(read, header)
    if header.pre_tokenizer is not None:
        _set_splitting(tokenizer, name, header.pre_tokenizer)
    return tokenizer


def _without_extra_tokens(read: PreTrainedTokenizerFast, header: Header) -> PreTrainedTokenizerFast:
    """The same tokenizer with the file's own tokens only, of which all control tokens are special.

    transformers adds GPT-2's end of text to vocabularies without it, beyond what the model embeds.
    """
    described = json.loads(read.backend_tokenizer.to_str())
    described["added_tokens"] = [token for token in described["added_tokens"] if token["id"] < header.tokens]
    backend = Tokenizer.from_str(json.dumps(described))
    known = {kind: token for kind in NAMED if (token := getattr(read, kind)) in backend.get_vocab()}
    control = [token["content"] for token in described["added_tokens"] if token["special"]]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        additional_special_tokens=[token for token in control if token not in known.values()],
        chat_template=read.chat_template,
        model_input_names=["input_ids", "attention_mask"],
        **({"model_max_length": header.context} if header.context else {}),
        **known,
    )


def _set_splitting(tokenizer: PreTrainedTokenizerFast, name: str, pre: str) -> None:
    """Makes a byte-level BPE split text by llama.cpp's rules of this name. Raises ModelError."""
    backend = tokenizer.backend_tokenizer
    if pre in SINGLE_DIGITS:
        split = [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
        backend.pre_tokenizer = pre_tokenizers.Sequence(split)
    elif pre not in AS_GPT2 and pre not in _known_splits():
        raise ModelError(
            f"The tokenizer in {name} splits text by the rules '{pre}', which are not known here; add the "
            "model as a folder or by its hub id instead."
        )
    if pre in WHOLE_WORDS_FIRST:
        backend.model.ignore_merges = True


def _known_splits() -> tuple[str, ...]:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    return tuple(GGUF_PRE_TOKENIZER_SPLITS)


def _model(where: str, file: str, name: str, config: Any) -> PreTrainedModel:
    """The dequantised model, in fp32."""
    try:
        with no_progress_bar():
            model, report = AutoModelForCausalLM.from_pretrained(
                where,
                config=config,
                gguf_file=file,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
                local_files_only=True,
                output_loading_info=True,
            )
    except (MemoryError, OSError):
        raise
    except Exception as error:
        if "ignore_mismatched_sizes" in str(error):
            raise ModelError(
                f"{name} holds weights of other shapes than its header says; {_AGAIN}."
            ) from error
        raise ModelError(
            f"{name} does not hold a causal language model that transformers can load ({_first_line(error)})."
        ) from error
    # transformers initialises missing weights randomly and only warns.
    if missing := sorted(report["missing_keys"]):
        raise ModelError(f"{name} lacks the weights {shortened(missing)}.")
    return model


def _first_line(error: Exception) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line.rstrip(".")


def _check_complete(model: PreTrainedModel, name: str, header: Header) -> None:
    """Raises ModelError if the model has not exactly the file's values, or some that are not numbers."""
    tensors = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}
    held = sum(tensor.numel() for tensor in tensors.values())
    if held != header.parameters:
        raise ModelError(
            f"{name} holds {header.parameters} values, and the model that transformers makes of it {held}, "
            "so it would not compute the same; add the model as a folder or by its hub id instead."
        )
    extremes = (extreme for tensor in tensors.values() for extreme in tensor.aminmax())
    if not all(bool(extreme.isfinite()) for extreme in extremes):  # NaN wins in both
        raise ModelError(f"{name} holds weights that are not numbers; {_AGAIN}.")


# --- the folder --------------------------------------------------------------------------------------------


def _holds(model: PreTrainedModel, dtype: torch.dtype) -> bool:
    """Whether the dtype has each value of the model's tensors exactly."""
    tensors = model.state_dict().values()
    return all(torch.equal(tensor.to(dtype).to(tensor.dtype), tensor) for tensor in tensors)


def _save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Saves the tokenizer under the names that servers with an older transformers read as well."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    saved.pop("backend", None)
    saved["tokenizer_class"] = "PreTrainedTokenizerFast"
    saved["additional_special_tokens"] = saved.pop("extra_special_tokens", [])
    path.write_text(json.dumps(saved, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    """The same model without the marks of its file, with which transformers would not save it."""
    config = model.config
    for mark in ("quantization_config", "_model_name_or_path"):  # the second: what the file calls the model
        if hasattr(config, mark):
            delattr(config, mark)
    with torch.device("meta"):
        plain = type(model)(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    return plain
