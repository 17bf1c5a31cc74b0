"""The options of BA-LoRA."""

from typing import ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from .base import SVDSpec


class BALoRASpec(SVDSpec):
    """BA-LoRA: PiSSA with three penalties on the logits (arXiv 2408.04556, second version)."""

    title: ClassVar[str] = "BA-LoRA"
    summary: ClassVar[str] = "PiSSA with penalties against drift, narrow answers and noise."
    paper: ClassVar[str] = "arXiv 2408.04556"
    cost: ClassVar[str] = (
        "Trains r (in + out) parameters per layer, with another forward of the base and all logits for each "
        "forward; exports a LoRA of rank 2r, or r with LoRA's start."
    )
    choose: ClassVar[str] = "For little or noisy data, when the model must not drift from what it knows."
    base_learning_rate: ClassVar[float] = 1.3e-5  # PiSSA's, whose start it has
    width_exponent: ClassVar[float] = 1.68

    method: Literal["ba_lora"] = "ba_lora"
    rank: int = Field(default=16, ge=1, le=4096, description="r, the width of the trained factors.")
    init: Literal["pissa", "lora"] = Field(
        default="pissa", description="Start from the weight's SVD, or as LoRA does."
    )
    lambda_consistency: float = Field(
        default=0.025, ge=0, description="λ1: weight of the divergence from the base; falls to a tenth."
    )
    lambda_diversity: float = Field(
        default=0.005,
        ge=0,
        description="λ2: weight of the likeliest tokens' entropy; from a fifth of the run.",
    )
    lambda_spectrum: float = Field(
        default=0.005, ge=0, description="λ3: weight of the largest singular values; from a fifth of the run."
    )
    temperature: float = Field(default=2.0, gt=0, le=100, description="τ of the divergence from the base.")
    top_tokens: int = Field(default=20, ge=2, description="K: number of tokens in the entropy.")
    top_singular_values: int = Field(default=10, ge=1, description="k: how many singular values are summed.")
    spectrum_norm: Literal["frobenius", "nuclear"] = Field(
        default="frobenius", description="The norm of the logits by which the sum is divided."
    )
    center_logits: bool = Field(
        default=False, description="Subtract each row's mean before the singular values are computed."
    )

    @field_validator("init")
    @classmethod
    def _no_svd_without_its_start(cls, init: str, others: ValidationInfo) -> str:
        default = cls.model_fields["svd_iterations"].default
        if init == "lora" and others.data.get("svd_iterations", default) != default:
            raise ValueError("must be 'pissa' where svd_iterations is given: LoRA's start has no SVD")
        return init

    @property
    def pair_rank(self) -> int:
        """2r, the difference of two products; r with LoRA's start."""
        return self.rank if self.init == "lora" else 2 * self.rank
