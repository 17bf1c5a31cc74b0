"""Tiny base models as `load_base` gives them, each read from its files once and then copied."""

import copy
from functools import cache
from pathlib import Path

import torch

from olora_core.bases.loading import Base, load_base
from olora_core.bases.reach import unreached_layers


def fresh_base(
    folder: Path, *, name: str = "tiny", dtype: torch.dtype | None = None, quantization: str = "none"
) -> Base:
    """A base that nobody else has. The copies share what was measured of a pass, as a trainer's jobs do."""
    loaded = _loaded(folder, name, dtype, quantization)
    base = copy.deepcopy(loaded, {id(loaded.pass_bytes): loaded.pass_bytes})
    unreached_layers(base.model)  # as `load_base` has found them
    return base


@cache
def _loaded(folder: Path, name: str, dtype: torch.dtype | None, quantization: str) -> Base:
    return load_base(folder, name=name, dtype=dtype, quantization=quantization)
