"""A base model in memory, loaded safely from its folder."""

import hashlib
import json
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import __version__ as transformers_version
from transformers.utils import logging

from ..data.turns import end_of_turn_tokens
from ..errors import ModelError, SpecError, shortened
from ..layers import quantisation
from ..layers.adapter import adapters_off
from ..layers.quantisation import Quantised
from ..specs import TrainSpec
from .passes import Passes, looks_ahead, passes_of
from .provenance import Provenance, file_sha256, read_provenance
from .sites import UNADAPTED, unadapted

INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")
UNFIT = {
    "cpmant": "it reads a row that is padded at its end as another text",
    "prophetnet": "its logits of a text depend on the padding behind it",
}
"""Families (`model_type`) that do not compute each row of a batch as they would alone, and how."""
PAD_CANDIDATES = ("<|finetune_right_pad_id|>", "<|pad|>", "<pad>", "[PAD]", "<|endoftext|>", "<unk>")


@dataclass
class Base:
    """A frozen causal language model and its tokenizer. Nothing ever writes its tensors."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    name: str
    """Its id in requests."""
    dtype: torch.dtype
    device: torch.device
    notes: list[str] = field(default_factory=list)
    """Notes for the owner of a job on this base."""
    pass_bytes: dict[Hashable, tuple[float, float, float]] = field(default_factory=dict)
    """Measured memory of a pass (see `memory.Estimate`), for the next job with such adapters."""
    quantised: Quantised | None = None
    """How its linear layers are quantised; None if they are not."""
    shards: int = 1
    """Number of devices its blocks are sharded over; see `sharding.shard`."""
    provenance: Provenance | None = None
    """Where its folder comes from, if `olora models add` made it."""

    @cached_property
    def passes(self) -> Passes:
        """How the model computes its forward passes."""
        with adapters_off(self.model):
            return passes_of(self.model)

    @property
    def width(self) -> int:
        """Hidden size of the model, or of its embedding if the config does not name one."""
        named = getattr(self.model.config.get_text_config(), "hidden_size", None)
        return int(named or self.model.get_input_embeddings().weight.shape[1])

    @property
    def embedded_tokens(self) -> int:
        """Number of tokens that the model has an embedding for; its tokenizer may have more."""
        return embedded_tokens(self.model)

    @cached_property
    def end_tokens(self) -> frozenset[int]:
        """Ids of the tokens that may end an answer, of those that the model embeds."""
        known = end_of_turn_tokens(self.tokenizer, self.model.generation_config.eos_token_id)
        return frozenset(token for token in known if token < self.embedded_tokens)

    @cached_property
    def padding(self) -> int:
        """Id of the token that fills rows up: the tokenizer's, unless its embedding is all zero.

        Where a packed row ends in zeros, a norm or a standard deviation of them (Gemma 3n) has no gradient,
        and 0 times it is NaN.
        """
        table, own = self.model.get_input_embeddings().weight, self.tokenizer.pad_token_id or 0
        candidates = [own, *sorted(self.end_tokens), *range(len(table))]
        return next((token for token in candidates if bool(table[token].any())), own)

    @property
    def reference(self) -> str:
        """How exported files name it: its id, unless its provenance has a name that says more elsewhere."""
        return (self.provenance and self.provenance.reference) or self.name

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the weight files, as `sha256sum *.safetensors | sha256sum` in the folder."""
        lines = [f"{file_sha256(path)}  {path.name}\n" for path in weight_files(self.folder)]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def load_base(
    folder: Path,
    *,
    name: str,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    quantization: str = "none",
) -> Base:
    """Loads a base from a local folder: safetensors only, no code from the folder, every parameter frozen.

    `dtype=None` keeps the checkpoint's dtype. `quantization` is as in the spec; a checkpoint with quantised
    weights stays quantised. Raises ModelError, or SpecError if `quantization` does not fit the checkpoint.
    """
    folder = Path(folder)
    config, provenance = load_config(folder, name), read_provenance(folder, name)
    kind = quantisation.choose_kind(quantization, config, name, device)
    from_files = getattr(config, "quantization_config", None) is not None
    tokenizer = _load_tokenizer(folder, name)
    how = {} if kind is None else {"device_map": {"": device}}
    if kind is not None and not from_files:
        how["quantization_config"] = quantisation.loading_config(kind, dtype or config.dtype or torch.float32)
    model, unused = _load_model(folder, name, config, dtype, how)
    model.requires_grad_(False)
    quantised = None
    if kind is None:
        model.to(device)
    else:
        quantisation.prepare_layers(model, kind, name, model.dtype)
        quantised = Quantised(kind, model.config.quantization_config.to_dict(), from_files)
    if reason := UNFIT.get(model.config.model_type):
        raise ModelError(f"Base model '{name}' ({type(model).__name__}) cannot be trained: {reason}.")
    _check_causal(model, name, folder)
    notes = [
        *_adopt_pad_token(tokenizer, embedded_tokens(model)),
        *_beyond(tokenizer, embedded_tokens(model)),
    ]
    if unused:
        notes.append(
            f"{len(unused)} tensors of the checkpoint are not used by the model: {shortened(unused)}."
        )
    notes += [
        f"{len(names)} {UNADAPTED[kind].format(names=shortened(names))}"
        for kind, names in unadapted(model).items()
    ]
    where = (folder, name, model.dtype, model.device)
    return Base(model, tokenizer, *where, notes, quantised=quantised, provenance=provenance)


def embedded_tokens(model: PreTrainedModel) -> int:
    """Number of rows of the model's input embedding."""
    return int(model.get_input_embeddings().weight.shape[0])


def check_quantization(spec: TrainSpec, base: Base) -> None:
    """Raises SpecError unless the base in memory is quantised as the spec says, or in its own checkpoint."""
    asked, resident = spec.hyperparameters.quantization, base.quantised
    kind = "none" if resident is None else resident.kind
    if asked != kind and not (asked == "none" and resident is not None and resident.from_files):
        raise SpecError(
            f"hyperparameters.quantization = '{asked}', and the base model is loaded with '{kind}'; give "
            "load_base the same.",
            param="hyperparameters.quantization",
        )


def check_folder(folder: Path, name: str) -> None:
    """Raises ModelError for a folder that cannot be loaded safely."""
    if not folder.is_dir():
        raise ModelError(f"Base model '{name}' not found: its folder does not exist.")
    if not (folder / "config.json").is_file():
        reason = "its folder has no config.json"
        if (folder / "adapter_config.json").is_file():
            reason = "its folder holds an adapter; give the base model it was trained on"
        raise ModelError(f"Base model '{name}' cannot be loaded: {reason}.")
    config = _read_json(folder / "config.json", name)
    if "transformers_weights" in config or "/" in str(config.get("attn_implementation", "")):
        raise ModelError(
            f"The config.json of base model '{name}' asks for files from elsewhere (transformers_weights or "
            "attn_implementation); remove these keys."
        )
    if (folder / "adapter_config.json").is_file():
        raise ModelError(f"Base model '{name}' has an adapter_config.json in its folder; merge or remove it.")
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise ModelError(
            f"Base model '{name}' has no tokenizer; copy tokenizer.json and "
            "tokenizer_config.json into its folder."
        )
    for path in weight_files(folder, name):
        try:
            with safe_open(path, framework="pt") as file:
                file.keys()
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{path.name} of base model '{name}' cannot be read ({error}); it is damaged or was "
                "not copied whole."
            ) from None


def weight_files(folder: Path, name: str | None = None) -> list[Path]:
    """The safetensors files that hold the weights: one file, or the shards that the index names.

    Raises ModelError when there are none, or a shard is missing.
    """
    name = name or folder.name
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if (folder / INDEX).is_file():
        shards = sorted(set(_read_json(folder / INDEX, name).get("weight_map", {}).values()))
        if missing := [shard for shard in shards if not (folder / shard).is_file()]:
            raise ModelError(f"Base model '{name}' misses {', '.join(missing)}, which {INDEX} names.")
        if shards:
            return [folder / shard for shard in shards]
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern))
    found = f"{pickles[0]} is a pickle, which can run code when it is opened" if pickles else "none is there"
    raise ModelError(
        f"Base model '{name}' has no model.safetensors in its folder: {found}. Convert the model with "
        "save_pretrained of a current transformers and copy its folder."
    )


def _read_json(path: Path, name: str) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path.name} of base model '{name}' is not JSON ({error}).") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path.name} of base model '{name}' is not a JSON object.")
    return value


def _load_tokenizer(folder: Path, name: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # a bad folder can raise anything
        raise ModelError(
            f"The tokenizer of base model '{name}' cannot be loaded: {_message(error, folder)}"
        ) from error


def load_config(folder: Path, name: str) -> PreTrainedConfig:
    """The model's configuration, after `check_folder`. Raises ModelError."""
    check_folder(folder, name)
    try:
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # a bad folder can raise anything
        raise ModelError(
            f"Base model '{name}' is not one that transformers {transformers_version} knows: "
            f"{_message(error, folder)}"
        ) from error


def _load_model(
    folder: Path, name: str, config: PreTrainedConfig, dtype: torch.dtype | None, how: dict[str, Any]
) -> tuple[PreTrainedModel, list[str]]:
    """The model, and the names of tensors in its files that it does not use."""
    if getattr(config.get_text_config(), "attn_logit_softcapping", None):
        # SDPA cannot cap its logits, and older transformers (5.17) let it leave the cap out without a word.
        how = {"attn_implementation": "eager"} | how
    try:
        with no_progress_bar():
            model, report = AutoModelForCausalLM.from_pretrained(
                str(folder),
                config=config,
                dtype=dtype or "auto",
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                **how,
            )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a bad folder can raise anything
        raise ModelError(
            f"Base model '{name}' is not a causal language model that transformers can load: "
            f"{_message(error, folder)}"
        ) from error
    # transformers initialises missing weights randomly and only warns.
    if missing := sorted(report["missing_keys"]):
        raise ModelError(f"The weights of base model '{name}' lack {shortened(missing)}.")
    return model, sorted(report["unexpected_keys"])


@contextmanager
def no_progress_bar() -> Iterator[None]:
    before = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            logging.enable_progress_bar()


def _message(error: Exception, folder: Path) -> str:
    """The first line of a library's error message, without the server's paths."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line.replace(f"{folder}/", "").replace(str(folder), "its folder")


def _check_causal(model: PreTrainedModel, name: str, folder: Path) -> None:
    """Raises ModelError for a model that does not compute logits of text alone, or looks both ways."""
    try:
        both_ways = looks_ahead(model)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # another family's inputs can fail in any way
        raise ModelError(
            f"Base model '{name}' ({type(model).__name__}) does not compute logits of text alone "
            f"({_message(error, folder)}); use a model that predicts the next token of a text."
        ) from error
    if not both_ways:
        return
    remedy = "use a model that was trained to predict the next token"
    if getattr(model.config, "is_decoder", None) is False:
        remedy += ", or set is_decoder to true in its config.json if this one was"
    raise ModelError(
        f"Base model '{name}' ({type(model).__name__}) is not causal: its logits depend on later tokens, as "
        f"in an encoder such as BERT; {remedy}."
    )


def _beyond(tokenizer: PreTrainedTokenizerBase, embedded: int) -> list[str]:
    """A note on the tokens that the model does not embed; most are other modalities', never in a text."""
    beyond = {token: text for text, token in tokenizer.get_vocab().items() if token >= embedded}
    if not beyond:
        return []
    names = shortened([f"'{beyond[token]}'" for token in sorted(beyond)])
    return [
        f"The model embeds {embedded} tokens, and its tokenizer has {len(beyond)} more ({names}); a row that "
        "contains one is refused."
    ]


def _adopt_pad_token(tokenizer: PreTrainedTokenizerBase, embedded: int) -> list[str]:
    """Gives a tokenizer without a padding token that the model embeds one of its other tokens. Returns notes.

    A new token would need a new row in the embedding. Labels are masked by position, not by id, so that even
    the end token can be used.
    """
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id < embedded:
        return []
    usable = {token for token, i in tokenizer.get_vocab().items() if i < embedded}
    free = [token for token in PAD_CANDIDATES if token in usable and token != tokenizer.eos_token]
    end = tokenizer.eos_token if tokenizer.eos_token in usable else None
    token = free[0] if free else end or tokenizer.convert_ids_to_tokens(0)
    tokenizer.pad_token = token
    also = ", also its end-of-text token," if token == tokenizer.eos_token else ""
    return [
        f"The tokenizer has no padding token that the model embeds; '{token}'{also} is used. Padding is "
        "never trained."
    ]
