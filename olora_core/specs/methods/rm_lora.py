"""The options of RM-LoRA."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from ..base import Auto
from .base import FactorsSpec


class RMLoRASpec(FactorsSpec):
    """RM-LoRA: LoRA whose factors stay near orthonormal and move a few at a time (arXiv 2407.12074)."""

    title: ClassVar[str] = "RM-LoRA"
    summary: ClassVar[str] = "LoRA with near-orthonormal factors, of which a random half moves at each step."
    paper: ClassVar[str] = "arXiv 2407.12074"
    cost: ClassVar[str] = (
        "Trains r (in + out) parameters per layer, of which p (in + out) get a gradient at each step; "
        "exports a LoRA of rank r."
    )
    choose: ClassVar[str] = (
        "For little data, where LoRA overfits: the mask reduces that, and the penalty makes the update use "
        "all of its directions. Unlike in the authors' program, only A and B are masked."
    )
    base_learning_rate: ClassVar[float] = 2.3e-4  # the authors' 1e-3, for a model 768 wide
    width_exponent: ClassVar[float] = 0.8850

    method: Literal["rm_lora"] = "rm_lora"
    rank: int = Field(default=8, ge=1, le=4096, description="r, the width of the trained factors.")
    moved_rank: Auto | Annotated[int, Field(ge=1, le=4096)] = Field(
        default="auto",
        description="p, the rows of A and columns of B that get a gradient at a step; auto: half the rank.",
    )
    variant: Literal["v1", "v2"] = Field(
        default="v1", description="v1: the same p components for A and B; v2: drawn separately."
    )
    orthogonality: float = Field(
        default=0.1,
        ge=0,
        le=1024,
        description="lambda, the weight of the orthogonality penalty; 0 turns it off.",
    )
    orthogonality_norm: Literal["plain", "squared"] = Field(
        default="plain",
        description="Frobenius distances from orthonormal are averaged as they are, or squared.",
    )
    init: Literal["kaiming", "gaussian"] = Field(
        default="kaiming",
        description="How A starts: uniform up to 1 / sqrt(in), or Gaussian with deviation 0.02, as in the "
        "authors' program.",
    )

    @field_validator("moved_rank")
    @classmethod
    def _no_more_than_there_are(cls, value: Auto | int, info: ValidationInfo) -> Auto | int:
        rank = info.data.get("rank", value)
        if value != "auto" and value > rank:
            raise ValueError(f"must be at most adapter.rank = {rank}")
        return value

    @property
    def moved(self) -> int:
        """p as a number."""
        return -(-self.rank // 2) if self.moved_rank == "auto" else self.moved_rank
