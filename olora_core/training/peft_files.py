"""An adapter in PEFT's format, made anywhere, as a model to train on from: plain LoRA and nothing else."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from ..bases.sites import ends_in
from ..errors import ModelError
from ..export.adapter import CONFIG, TENSORS
from ..export.manifest import Link
from ..specs.methods.lora import LoRASpec

NAME = re.compile(r"base_model\.model\.(?P<site>.+)\.lora_(?P<factor>[AB])(?:\.default)?\.weight")
PLAIN = re.compile(r"[\w.-]+")
MUST_BE_OFF = (
    *("use_dora", "lora_bias", "modules_to_save", "layer_replication", "trainable_token_indices"),
    *("target_parameters", "use_qalora", "alora_invocation_tokens", "arrow_config"),
)
"""Options of PEFT's that make something else of a pair than `s B A x`."""


def read_peft(folder: Path) -> tuple[Link, dict[str, Tensor]]:
    """The pairs in a folder as one LoRA link, and its tensors by `<site>.<factor>`, fp32.

    Layers of different rank or scale get the largest rank, filled up with zeros, and the scale in B.
    Raises ModelError, naming what does not fit.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / TENSORS)
        _check(config)
        pairs = _pairs(tensors)
        scales = {site: _scale(config, site, A.shape[0]) for site, (A, _) in pairs.items()}
        rank, is_uniform, scale = _common(pairs, scales)
        link = Link(LoRASpec(rank=rank, alpha=scale * rank), seed=0, total_steps=1)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise _unusable(f"{type(error).__name__}: {error}") from None
    made = {}
    for site, (A, B) in pairs.items():
        missing = rank - A.shape[0]
        made[f"{site}.A"] = F.pad(A, (0, 0, 0, missing))
        made[f"{site}.B"] = F.pad(B if is_uniform else scales[site] * B, (0, missing))
    return link, made


def _common(
    pairs: Mapping[str, tuple[Tensor, Tensor]], scales: Mapping[str, float]
) -> tuple[int, bool, float]:
    """The largest rank, whether all layers have it and one scale, and that scale, or else 1."""
    ranks = {A.shape[0] for A, _ in pairs.values()}
    is_uniform = len(ranks) == 1 and len(set(scales.values())) == 1
    return max(ranks), is_uniform, next(iter(scales.values())) if is_uniform else 1.0


def _check(config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise _unusable(f"its peft_type is {config.get('peft_type')!r}, and only LORA can be trained on")
    if config.get("bias", "none") != "none":
        raise _unusable(f"it trains biases (bias = {config['bias']!r})")
    for name in MUST_BE_OFF:
        if config.get(name):
            raise _unusable(f"it uses {name}, which is more than a pair of factors")


def _pairs(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) of each layer, r×in and out×r, fp32."""
    factors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = NAME.fullmatch(name)
        if match is None:
            raise _unusable(f"its tensor {name[:120]!r} is not a factor of a linear layer")
        if tensor.dim() != 2 or not tensor.isfinite().all():
            raise _unusable(f"its tensor {name[:120]!r} is not a finite matrix")
        factors.setdefault(match["site"], {})[match["factor"]] = tensor.to(torch.float32)
    if not factors:
        raise _unusable("it holds no tensors")
    for site, found in factors.items():
        if len(found) != 2 or found["A"].shape[0] != found["B"].shape[1] or not len(found["A"]):
            raise _unusable(f"the factors of layer {site[:120]!r} do not make a pair")
    return {site: (found["A"], found["B"]) for site, found in factors.items()}


def _scale(config: Mapping[str, Any], site: str, rank: int) -> float:
    """s of a layer: PEFT's patterns match the end of its path.

    PEFT takes them for regular expressions. Here only names are: an expression may take for ever.
    """
    patterns = config.get("alpha_pattern") or {}
    for key in patterns:
        if not PLAIN.fullmatch(key):
            raise _unusable(f"its alpha_pattern {key[:80]!r} is not a plain name of layers")
    found = (value for key, value in patterns.items() if ends_in(site, key))
    alpha = float(next(found, config["lora_alpha"]))
    if not 0 < alpha < math.inf:
        raise _unusable(f"its alpha for layer {site[:120]!r} is {alpha:g}")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _unusable(problem: str) -> ModelError:
    return ModelError(f"The adapter to train on from cannot be used: {problem}.", param="model")
