"""Layers whose adapters PEFT does not load, found by their names.

Nothing here imports PEFT: tests/families compares these tables with the installed one, in both directions.
"""

from torch import nn
from transformers import conversion_mapping as conversions

EXPERT_NAMES = {
    "mixtral": ("gate", "w1", "w2", "w3"),
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
}
"""By checkpoint layout: names that PEFT maps to the fused experts when it loads an adapter."""
MAMBA_NAMES = ("out_proj", "conv1d")
MAMBA_FAMILIES = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
"""Families (`model_type`) in which PEFT refuses MAMBA_NAMES: their kernels use the weights directly."""

RENAMED_PARTS = {"laguna": "shared_experts"}
"""By family: a part of paths that PEFT renames as if it were the checkpoint's, and then does not find."""


def why_not_loadable(model: nn.Module, path: str) -> str | None:
    """Why PEFT would not load an adapter of this layer; None if it would."""
    family, name = getattr(model.config, "model_type", None), path.rpartition(".")[2]
    if name in EXPERT_NAMES.get(_layout(family), ()):
        return f"PEFT maps its name to the fused experts of a {family} and would not load its adapter"
    if family in MAMBA_FAMILIES and name in MAMBA_NAMES:
        return f"PEFT refuses '{name}' in a {family}, whose Mamba kernels use its weight directly"
    if RENAMED_PARTS.get(family) in path.split("."):
        return f"PEFT renames it in a {family} and would not load its adapter"
    return None


def _layout(family: str | None) -> str | None:
    """The checkpoint layout of a family that PEFT converts adapters from."""
    return "mixtral" if family == "mixtral" else conversions._MODEL_TO_CONVERSION_PATTERN.get(family)
