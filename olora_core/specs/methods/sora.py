"""The options of SoRA."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from ..base import Auto
from .base import MAX_LEARNING_RATE, AdapterSpec


class SoRASpec(AdapterSpec):
    """SoRA: LoRA with a gate on each component, which shrinks to exact zeros (arXiv 2311.11696)."""

    title: ClassVar[str] = "SoRA"
    summary: ClassVar[str] = "LoRA with a trained gate on each component; gates of little use shrink to 0."
    paper: ClassVar[str] = "arXiv 2311.11696"
    cost: ClassVar[str] = (
        "Trains r (in + out + 1) parameters per layer; exports a LoRA whose rank is the largest number of "
        "gates that a layer has left, at most r."
    )
    choose: ClassVar[str] = (
        "When the right rank is not known: start with a high one, and training leaves each layer what it "
        "uses."
    )
    base_learning_rate: ClassVar[float] = 1.8e-4  # the authors' 8e-4, for a model 768 wide
    width_exponent: ClassVar[float] = 1.2637

    method: Literal["sora"] = "sora"
    rank: int = Field(default=16, ge=1, le=4096, description="r, the components that a layer starts with.")
    threshold: Auto | Annotated[float, Field(ge=0, le=1024)] = Field(
        default="auto",
        description="xi: every gate shrinks by this much after every step; auto: 0.5 / the run's steps.",
    )
    threshold_times_rate: bool = Field(
        default=False,
        description="Multiply the threshold by the gates' learning rate at each step; it must then be given.",
    )
    gate_learning_rate: Auto | Annotated[float, Field(ge=0, le=MAX_LEARNING_RATE)] = Field(
        default="auto",
        description="The gates' peak rate; auto: 2.5 times the threshold, or the job's rate if the "
        "threshold is 0 or multiplied by the rate.",
    )
    gate_init: Literal["normal", "ones"] = Field(
        default="normal", description="How the gates start: drawn from N(0, 1), or all 1."
    )
    factor_decay: Auto | Annotated[float, Field(ge=0, le=1)] = Field(
        default="auto",
        description="Weight decay of both factors, never of the gates; auto: the job's weight_decay, or 0.1 "
        "if it is 0.",
    )

    @field_validator("threshold_times_rate")
    @classmethod
    def _a_factor_is_given(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("threshold") == "auto":
            raise ValueError("must be false unless adapter.threshold is given: auto is meant per step")
        return value
