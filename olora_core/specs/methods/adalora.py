"""The options of AdaLoRA."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from ..base import Auto
from .base import AdapterSpec


class AdaLoRASpec(AdapterSpec):
    """AdaLoRA: a falling budget of components, for which all layers compete (arXiv 2303.10512)."""

    title: ClassVar[str] = "AdaLoRA"
    summary: ClassVar[str] = (
        "SVD-like updates whose components compete, over all layers, for a falling budget."
    )
    paper: ClassVar[str] = "arXiv 2303.10512"
    cost: ClassVar[str] = (
        "Trains r (in + out + 1) parameters per layer and keeps two statistics for each; exports a LoRA "
        "whose rank is the largest number of components that a layer keeps, at most r."
    )
    choose: ClassVar[str] = (
        "When a small adapter should use its rank where it matters most, in a run long enough to find out: "
        "it learns more slowly than LoRA."
    )
    base_learning_rate: ClassVar[float] = 1e-3
    width_exponent: ClassVar[float] = 0.8850

    method: Literal["adalora"] = "adalora"
    rank: int = Field(default=12, ge=1, le=4096, description="r, the components that a layer starts with.")
    alpha: float = Field(
        default=16,
        gt=0,
        le=65536,
        description="The update is scaled by alpha / rank, also when fewer components are left.",
    )
    target_rank: Auto | Annotated[int, Field(ge=1, le=4096)] = Field(
        default="auto",
        description="Components that a layer keeps on average; auto: two thirds of the rank.",
    )
    initial_steps: Auto | Annotated[int, Field(ge=0)] = Field(
        default="auto", description="t_i, steps before the budget falls; auto: a tenth of the run's."
    )
    final_steps: Auto | Annotated[int, Field(ge=1)] = Field(
        default="auto",
        description="t_f, steps at the end that train only what was kept; auto: four tenths of the run's.",
    )
    mask_interval: Auto | Annotated[int, Field(ge=1)] = Field(
        default="auto",
        description="Delta T, steps from one masking to the next; auto: a hundredth of the run's, up to 10.",
    )
    beta1: float = Field(default=0.85, gt=0, lt=1, description="Decay of the running mean of the importance.")
    beta2: float = Field(
        default=0.85, gt=0, lt=1, description="Decay of the running mean of its uncertainty."
    )
    orthogonality: float = Field(
        default=0.1,
        ge=0,
        le=1024,
        description="gamma, the weight of the orthogonality penalty; 0 turns it off.",
    )
    orthogonality_norm: Literal["plain", "squared_sum"] = Field(
        default="plain",
        description="Frobenius distances from orthonormal are averaged (plain), or squared and summed.",
    )

    @field_validator("rslora")
    @classmethod
    def _has_its_own_scale(cls, value: bool) -> bool:
        if value:
            raise ValueError("must be false, since the scale of AdaLoRA is alpha / rank; raise alpha instead")
        return value

    @field_validator("target_rank")
    @classmethod
    def _no_more_than_there_are(cls, value: Auto | int, info: ValidationInfo) -> Auto | int:
        rank = info.data.get("rank", value)
        if value != "auto" and value > rank:
            raise ValueError(f"must be at most adapter.rank = {rank}")
        return value

    @property
    def target(self) -> int:
        """target_rank as a number; in the paper the budget starts at 1.5 times its end."""
        return max(1, 2 * self.rank // 3) if self.target_rank == "auto" else self.target_rank

    @property
    def scale(self) -> float:
        """c, with the small constant of the reference implementation."""
        return self.alpha / (self.rank + 1e-5)
