"""The options of OLoRA."""

from typing import ClassVar, Literal

from pydantic import Field

from .base import FactorsSpec


class OLoRASpec(FactorsSpec):
    """OLoRA: factors that start from the thin QR of the pretrained weight (arXiv 2406.01775)."""

    title: ClassVar[str] = "OLoRA"
    summary: ClassVar[str] = "LoRA whose factors start from the QR decomposition of the pretrained weight."
    paper: ClassVar[str] = "arXiv 2406.01775"
    cost: ClassVar[str] = (
        "Trains r (in + out) parameters per layer and keeps as many frozen; exports a LoRA of rank 2r."
    )
    choose: ClassVar[str] = (
        "The default: training starts in directions that the pretrained weight already has, at a lower "
        "learning rate than LoRA's."
    )
    base_learning_rate: ClassVar[float] = 4e-6
    width_exponent: ClassVar[float] = 1.96
    scale_exponent: ClassVar[float] = 1.0  # the update is s (B0 dA + dB A0) to first order
    rank_exponent: ClassVar[float] = 0.92

    method: Literal["olora"] = "olora"
    rank: int = Field(default=8, ge=1, le=4096, description="r, the width of the trained factors.")

    @property
    def pair_rank(self) -> int:
        """2r: the difference of two products."""
        return 2 * self.rank
