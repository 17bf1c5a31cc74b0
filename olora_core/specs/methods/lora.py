"""The options of LoRA."""

from typing import ClassVar, Literal

from pydantic import Field

from .base import FactorsSpec


class LoRASpec(FactorsSpec):
    """LoRA: a random and a zero factor beside the frozen weight (arXiv 2106.09685)."""

    title: ClassVar[str] = "LoRA"
    summary: ClassVar[str] = "Two thin factors beside every frozen weight, one random, one zero."
    paper: ClassVar[str] = "arXiv 2106.09685"
    cost: ClassVar[str] = "Trains r (in + out) parameters per layer; exports a LoRA of rank r."
    choose: ClassVar[str] = (
        "For the smallest file at a given rank, for servers that take low ranks only, and as the baseline "
        "for the others."
    )
    base_learning_rate: ClassVar[float] = 2e-4
    width_exponent: ClassVar[float] = 0.8850

    method: Literal["lora"] = "lora"
    rank: int = Field(default=8, ge=1, le=4096, description="r, the width of the trained factors.")
