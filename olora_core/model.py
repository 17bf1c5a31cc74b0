"""A base model in memory, and the linear layers of it that can be adapted."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import regex
import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import __version__ as transformers_version
from transformers import conversion_mapping as conversions
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from . import quantisation
from .adapter import (
    AdaptedLinear,
    Kind,
    Site,
    adapters_off,
    attached,
    bare_modules,
    is_linear,
    site_shape,
    site_weight,
)
from .errors import ModelError, SpecError
from .passes import Passes, passes_of
from .quantisation import Quantised
from .specs import TrainSpec, nearest

INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")
PAD_CANDIDATES = ("<|finetune_right_pad_id|>", "<|pad|>", "<pad>", "[PAD]", "<|endoftext|>", "<unk>")
MATCH_SECONDS = 0.2
ALL_LINEAR = ("auto", "all-linear")
LEFT_OUT = {
    "experts": "fused expert tensors ({names}) are not linear layers and are not adapted.",
    "routers": "routers ({names}) are not adapted unless they are linear layers and named.",
    "layers": "layers ({names}) are not adapted, for PEFT would take their names for the experts'.",
    "tensors": "matrices ({names}) are in no linear layer and are not adapted.",
}
"""What is said of each kind that `left_out` tells apart, after its number."""
TAKEN_FOR_EXPERTS = {
    "mixtral": ("gate", "w1", "w2", "w3"),
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
}
"""Names that PEFT moves to the fused experts when it loads an adapter, wherever else a layer bears them."""


@dataclass
class Base:
    """A frozen causal language model and its tokenizer. Nothing ever writes its tensors."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    name: str
    """The id that callers know it by."""
    dtype: torch.dtype
    device: torch.device
    notes: list[str] = field(default_factory=list)
    """Sentences the owner of a job on this base should read."""
    pass_bytes: dict[Hashable, tuple[float, float, float]] = field(default_factory=dict)
    """What passes were found to take (see `plan.Estimate`), for the next job with such adapters."""
    quantised: Quantised | None = None
    """How its linear layers hold their weights; None for those of the checkpoint."""
    shards: int = 1
    """Over how many devices its blocks are spread; see `sharding.shard`."""

    @cached_property
    def passes(self) -> Passes:
        """How the model is run forward."""
        with adapters_off(self.model):
            return passes_of(self.model)

    @cached_property
    def fingerprint(self) -> str:
        """What `sha256sum *.safetensors | sha256sum` prints in the folder, of the files that are loaded."""
        lines = []
        for path in weight_files(self.folder):
            with path.open("rb") as file:
                lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}\n")
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def load_base(
    folder: Path,
    *,
    name: str,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    quantization: str = "none",
) -> Base:
    """Loads a base from a local folder: safetensors only, never its own code, every parameter frozen.

    `dtype=None` keeps the checkpoint's own. `quantization` is as in the spec; a checkpoint that is quantised
    in its files stays so. Raises ModelError or SpecError with the remedy.
    """
    folder = Path(folder)
    config = load_config(folder, name)
    kind = quantisation.planned(quantization, config, name, device)
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
        quantisation.settle(model, kind, name, model.dtype)
        quantised = Quantised(kind, model.config.quantization_config.to_dict(), from_files)
    notes = _adopt_pad_token(tokenizer)
    if unused:
        notes.append(
            f"{len(unused)} tensors of the checkpoint have no place in the model: {shortened(unused)}."
        )
    rows = model.get_input_embeddings().weight.shape[0]
    if (highest := max(tokenizer.get_vocab().values())) >= rows:
        raise ModelError(
            f"The tokenizer of base model '{name}' has token {highest}, but the model embeds {rows} tokens; "
            "the tokenizer belongs to another model."
        )
    notes += [
        f"{len(names)} {LEFT_OUT[kind].format(names=shortened(names))}"
        for kind, names in left_out(model).items()
    ]
    return Base(model, tokenizer, folder, name, model.dtype, model.device, notes, quantised=quantised)


def check_quantization(spec: TrainSpec, base: Base) -> None:
    """The resident base must be quantised as the run asks: a base that is so in its files needs no asking."""
    asked, resident = spec.hyperparameters.quantization, base.quantised
    kind = "none" if resident is None else resident.kind
    if asked != kind and not (asked == "none" and resident is not None and resident.from_files):
        raise SpecError(
            f"hyperparameters.quantization = '{asked}', and the base model is loaded with '{kind}'; give "
            "load_base the same.",
            param="hyperparameters.quantization",
        )


def check_folder(folder: Path, name: str) -> None:
    """Refuses a folder that cannot be loaded safely, saying what is wrong with it."""
    if not folder.is_dir():
        raise ModelError(f"Base model '{name}' is not there: its folder does not exist.")
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
    except Exception as error:  # a foreign folder fails in any way at all
        raise ModelError(
            f"The tokenizer of base model '{name}' cannot be loaded: {_told(error, folder)}"
        ) from error


def load_config(folder: Path, name: str) -> PreTrainedConfig:
    """The model's configuration, from a folder that `check_folder` lets pass. Raises ModelError."""
    check_folder(folder, name)
    try:
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # a foreign folder fails in any way at all
        raise ModelError(
            f"Base model '{name}' is not one that transformers {transformers_version} knows: "
            f"{_told(error, folder)}"
        ) from error


def _load_model(
    folder: Path, name: str, config: PreTrainedConfig, dtype: torch.dtype | None, how: dict[str, Any]
) -> tuple[PreTrainedModel, list[str]]:
    """The model, and the names of tensors in its files that it does not use. `how` is for transformers."""
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
    except Exception as error:  # a foreign folder fails in any way at all
        raise ModelError(
            f"Base model '{name}' is not a causal language model that transformers can load: "
            f"{_told(error, folder)}"
        ) from error
    # transformers fills what a checkpoint lacks with random numbers and goes on.
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


def _told(error: Exception, folder: Path) -> str:
    """The first line of a library's error, without the server's paths."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line.replace(f"{folder}/", "").replace(str(folder), "its folder")


def shortened(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _adopt_pad_token(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Gives a tokenizer without padding one of its own tokens. Returns what to note.

    Never adds a token, for that would need a new row in the embedding. Labels are masked by position, so that
    even the end token can serve.
    """
    if tokenizer.pad_token_id is not None:
        return []
    vocabulary = tokenizer.get_vocab()
    free = [token for token in PAD_CANDIDATES if token in vocabulary and token != tokenizer.eos_token]
    token = free[0] if free else tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    tokenizer.pad_token = token
    also = ", also its end-of-text token," if token == tokenizer.eos_token else ""
    return [
        f"The tokenizer has no padding token; its '{token}'{also} fills the rows. Padding is never trained."
    ]


def _fused(model: nn.Module) -> list[tuple[str, str, nn.Parameter]]:
    """Parameters that hold the matrices of several experts in one 3-D tensor.

    Path of the module, name and tensor; a convolution's kernel or a vector with extra axes is none.
    """
    return [
        (path, name, parameter)
        for path, module in bare_modules(model)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and min(parameter.shape) > 1 and not isinstance(module, _ConvNd)
    ]


def left_out(model: nn.Module) -> dict[str, list[str]]:
    """What target_modules = "auto" does not adapt inside the blocks, by kind (see LEFT_OUT).

    A linear layer is given by its path, anything else by the name of its tensor. A layer that bears an
    adapter, because it was named, is not left out.
    """
    found: dict[str, list[str]] = {kind: [] for kind in LEFT_OUT}
    stacks = block_stacks(model)
    owners = {path for path, _, _ in _fused(model)}
    routers = _routers(model)
    adapted = {path for path, module in model.named_modules() if isinstance(module, AdaptedLinear)}
    for path, module in bare_modules(model):
        if path in adapted or _block_of(path, stacks)[0] is None or isinstance(module, nn.Embedding):
            continue
        if is_linear(module):
            if path in routers:
                found["routers"].append(path)
            elif _taken_for_experts(model, path):
                found["layers"].append(path)
            elif _does_more(module):
                found["tensors"].append(f"{path}.weight")
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if sum(size > 1 for size in parameter.shape) < 2:  # a vector, whatever its axes
                continue
            kind = "experts" if path in owners else "routers" if path in routers else "tensors"
            found[kind].append(f"{path}.{name}")
    return {kind: names for kind, names in found.items() if names}


def _routers(model: nn.Module) -> set[str]:
    """Paths of the gates beside fused experts: a matrix with one row, or as many as there are experts.

    Told by shape and place, since every family has a name of its own for them. A gate stands in the experts'
    own block, or alone in a module there; the projections of a shared expert have siblings.
    """
    counts = {path.rpartition(".")[0]: parameter.shape[0] for path, _, parameter in _fused(model)}
    matrices = {
        path: site_shape(module)[0]
        for path, module in bare_modules(model)
        if counts
        and isinstance(weight := getattr(module, "weight", None), torch.Tensor)
        and weight.dim() == 2
    }
    siblings = Counter(path.rpartition(".")[0] for path in matrices)
    return {
        path
        for path, rows in matrices.items()
        for block, count in counts.items()
        if path.startswith(f"{block}.") and rows in (1, count)
        if (parent := path.rpartition(".")[0]) == block or siblings[parent] == 1
    }


def _taken_for_experts(model: nn.Module, path: str) -> bool:
    """Whether PEFT would look for this layer's factors among the fused experts, and not load them."""
    family = getattr(model.config, "model_type", None)
    family = "mixtral" if family == "mixtral" else conversions._MODEL_TO_CONVERSION_PATTERN.get(family)
    return path.rpartition(".")[2] in TAKEN_FOR_EXPERTS.get(family, ())


def target_sites(model: PreTrainedModel, target_modules: str | Sequence[str]) -> list[Site]:
    """The layers to adapt, in model order.

    "auto" (or "all-linear"): every linear layer of the transformer blocks but routers; `left_out` tells what
    it does not take. A list: each name matches the layers whose path is it or ends in `.name`. Any other
    string: a regular expression for the whole path. The rules are PEFT's. The model must bear no adapters.

    Raises SpecError for a name that matches nothing, and for one that matches what cannot be adapted.
    """
    if attached(model):
        raise ValueError("The model bears adapters already; detach them first.")
    stacks = block_stacks(model)
    if target_modules in ALL_LINEAR:
        chosen = [name for name in _linear_layers(model) if _block_of(name, stacks)[0] is not None]
        routers = _routers(model)
        chosen = [name for name in chosen if name not in routers and _obstacle(model, name) is None]
        if not chosen:
            raise _no_match(model, "target_modules = 'auto' finds no linear layer inside the model's blocks")
    elif isinstance(target_modules, str):
        chosen = _chosen(model, _full_match(target_modules))
        if not chosen:
            raise _no_match(
                model,
                f"no linear layer's whole path matches the regular expression '{target_modules}' "
                f'(to name layers, give a list: ["{target_modules}"])',
            )
    else:
        wanted = set()
        for ending in target_modules:
            matched = _chosen(model, lambda name, ending=ending: ends_in(name, ending))
            if not matched:
                raise _no_match(
                    model, f"no linear layer is named '{ending}'{nearest(ending, _endings(model))}"
                )
            wanted.update(matched)
        chosen = [name for name in _linear_layers(model) if name in wanted]
    return [_site(model, name, stacks) for name in chosen]


def _full_match(pattern: str) -> Callable[[str], bool]:
    """Whether a whole path matches. Raises SpecError for a pattern that takes for ever to try."""
    try:
        compiled = regex.compile(pattern)
    except regex.error as error:
        raise SpecError(
            f"adapter.target_modules: '{pattern}' is not a regular expression ({error}).",
            param="adapter.target_modules",
        ) from None

    def matches(name: str) -> bool:
        try:
            return compiled.fullmatch(name, timeout=MATCH_SECONDS) is not None
        except TimeoutError:
            raise SpecError(
                f"adapter.target_modules: the regular expression '{pattern}' takes too long to try on "
                f"'{name}'; write it without nested repetition, or give a list of names.",
                param="adapter.target_modules",
            ) from None

    return matches


def ends_in(name: str, ending: str) -> bool:
    """Whether a list of target modules with this entry selects that path, by the rule of PEFT."""
    return name == ending or name.endswith(f".{ending}")


def _chosen(model: PreTrainedModel, matches: Callable[[str], bool]) -> list[str]:
    """The linear layers whose path matches. Refuses other layers and tensors that match."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3 and matches(name):
            raise _refusal(name, "it holds the matrices of several experts in one tensor")
    chosen = []
    for name, module in model.named_modules():
        if name and matches(name) and (is_linear(module) or module._parameters):
            if reason := _obstacle(model, name):
                raise _refusal(name, reason)
            chosen.append(name)
    return chosen


def _obstacle(model: PreTrainedModel, name: str) -> str | None:
    """Why this layer cannot be adapted, or None."""
    module = model.get_submodule(name)
    if not is_linear(module) or _does_more(module):
        return f"it is a {type(module).__name__}, not a linear layer"
    weight = module.weight
    if any(m.weight is weight for m in model.modules() if isinstance(m, nn.Embedding)):
        return "its weight is tied to the token embedding"
    if reason := quantisation.obstacle(module):
        return reason
    if _taken_for_experts(model, name):
        family = model.config.model_type
        return f"PEFT takes its name for the fused experts of a {family} and would not load its adapter"
    return None


@torch.no_grad()
def _does_more(module: nn.Module) -> bool:
    """Whether a family's own kind of linear layer gives something else than W x + bias.

    Asked by calling it, for some only say otherwise what they inherit.
    """
    if not type(module).__module__.startswith("transformers.models."):
        return False
    weight = site_weight(module)
    x = torch.ones(1, weight.shape[1], dtype=weight.dtype, device=weight.device)
    try:
        got = module(x)
    except (RuntimeError, ValueError, IndexError):
        return True
    expected = nn.functional.linear(x, weight, module.bias)
    if not isinstance(got, torch.Tensor) or got.shape != expected.shape:
        return True
    return bool((got - expected).float().norm() > 0.05 * expected.float().norm())  # bf16 rounds


def _refusal(name: str, reason: str) -> SpecError:
    return SpecError(
        f"adapter.target_modules names '{name}', which cannot be adapted: {reason}. Leave it out.",
        param="adapter.target_modules",
    )


def _no_match(model: PreTrainedModel, what: str) -> SpecError:
    return SpecError(
        f"adapter.target_modules: {what}. Available: {', '.join(_endings(model))}.",
        param="adapter.target_modules",
    )


def _linear_layers(model: PreTrainedModel) -> list[str]:
    return [name for name, module in model.named_modules() if is_linear(module)]


def _endings(model: PreTrainedModel) -> list[str]:
    """Last part of the path of every layer that can be adapted, each once."""
    layers = [name for name in _linear_layers(model) if _obstacle(model, name) is None]
    return list(dict.fromkeys(name.rpartition(".")[2] for name in layers))


def block_stacks(model: nn.Module) -> dict[str, int]:
    """Path and length of each outermost list of modules: `model.layers`, `transformer.h`."""
    stacks: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{s}.") for s in stacks):
            stacks[name] = len(module)
    return stacks


def _block_of(name: str, stacks: dict[str, int]) -> tuple[int | None, int]:
    """Number of the block that holds this layer, and of the blocks in its stack; (None, 0) outside."""
    for stack, length in stacks.items():
        if name.startswith(f"{stack}."):
            return int(name[len(stack) + 1 :].partition(".")[0]), length
    return None, 0


def _site(model: nn.Module, name: str, stacks: dict[str, int]) -> Site:
    module = model.get_submodule(name)
    out_features, in_features = site_shape(module)
    kind: Kind = "conv1d" if isinstance(module, Conv1D) else "linear"
    return Site(name, *_block_of(name, stacks), kind, out_features, in_features)
