"""The options of XGBLoRA."""

from typing import ClassVar, Literal

from pydantic import Field

from .base import RoundsSpec


class XGBLoRASpec(RoundsSpec):
    """XGBLoRA: gradient boosting, with LoRAs of a few blocks as weak learners (arXiv 2410.19694)."""

    title: ClassVar[str] = "XGBLoRA"
    summary: ClassVar[str] = "Many rounds of rank-1 LoRAs on a few random blocks each, which add up."
    paper: ClassVar[str] = "arXiv 2410.19694"
    cost: ClassVar[str] = (
        "Trains r (in + out) parameters per layer at a time, in a third of the blocks, and keeps those of "
        "finished rounds; exports a LoRA of rank r times the rounds that drew a layer, by default up to "
        "about 30."
    )
    choose: ClassVar[str] = "For long jobs, when an update of high rank should be made of many small ones."
    base_learning_rate: ClassVar[float] = 2e-4
    width_exponent: ClassVar[float] = 0.8850

    method: Literal["xgblora"] = "xgblora"
    rank: int = Field(default=1, ge=1, le=4096, description="r, the width of a round's factors.")
    alpha: float = Field(default=2, gt=0, le=65536, description="The update is scaled by alpha / rank.")
    layers_per_round: int | None = Field(
        default=None,
        ge=1,
        description="Number of blocks that a round draws, at most all; null: a third, rounded up.",
    )
    steps_per_round: int | None = Field(
        default=None, ge=1, description="Steps in a round; null: a 64th of the job's, at least 16."
    )
    boosting_rate: float = Field(default=1.0, ge=0, le=1, description="Factor of what a finished round adds.")
    ramp_steps: int | None = Field(
        default=None,
        ge=1,
        description="Steps over which the rate rises in later rounds; null: a tenth of a round, 1 to 10.",
    )
