"""The dtype a run computes in."""

import time
from functools import cache
from pathlib import Path

import torch

from ..specs import TrainSpec
from .loading import load_config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WORTH_IT = 1.5
"""bf16 is chosen if it multiplies matrices this much faster, since the rest of a step does not gain."""
PROBE_TOKENS, PROBE_ROUNDS = 512, 5
UNKNOWN_WIDTH = 1024
"""For a config that does not name its hidden size, such as BLT's, whose parts have one each."""


def compute_dtype(spec: TrainSpec, folder: Path, device: str = "cpu") -> torch.dtype:
    """The dtype to load the base in, before `train`.

    The spec's; for "auto", bf16 if the checkpoint has 16-bit weights and the device is faster with it.
    An fp32 checkpoint stays fp32, since rounding it would change the base.
    """
    asked = spec.hyperparameters.dtype
    if asked != "auto":
        return DTYPES[asked]
    config = load_config(folder, spec.model).get_text_config()
    if config.dtype not in (torch.bfloat16, torch.float16):
        return torch.float32
    width = getattr(config, "hidden_size", None) or UNKNOWN_WIDTH
    inner = getattr(config, "intermediate_size", None) or 4 * width
    return torch.bfloat16 if bf16_is_faster(device, width, inner) else torch.float32


@cache
def bf16_is_faster(device: str, width: int, inner: int) -> bool:
    """Times a block's largest product, (512, width) × (width, inner), in both dtypes, once per process."""
    seconds = dict.fromkeys(DTYPES.values(), float("inf"))
    operands = {
        dtype: (
            torch.ones(PROBE_TOKENS, width, dtype=dtype, device=device),
            torch.ones(width, inner, dtype=dtype, device=device),
        )
        for dtype in seconds
    }
    for _ in range(PROBE_ROUNDS):
        for dtype, (x, weight) in operands.items():
            seconds[dtype] = min(seconds[dtype], _seconds(x, weight))
    return seconds[torch.float32] > WORTH_IT * seconds[torch.bfloat16]


def _seconds(x: torch.Tensor, weight: torch.Tensor) -> float:
    """Time of four products, until the device has finished them."""
    _synchronize(x.device)
    began = time.perf_counter()
    for _ in range(4):
        x @ weight
    _synchronize(x.device)
    return time.perf_counter() - began


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
