"""The options of PiSSA."""

from typing import ClassVar, Literal

from pydantic import Field

from .base import SVDSpec


class PiSSASpec(SVDSpec):
    """PiSSA: factors that start as the principal part of the pretrained weight (arXiv 2404.02948)."""

    title: ClassVar[str] = "PiSSA"
    summary: ClassVar[str] = "LoRA whose factors start from the largest singular values of the weight."
    paper: ClassVar[str] = "arXiv 2404.02948"
    cost: ClassVar[str] = (
        "Trains r (in + out) parameters per layer and keeps as many frozen; exports a LoRA of rank 2r."
    )
    choose: ClassVar[str] = (
        "Like OLoRA, when few singular values hold most of a weight; its start takes longer to compute."
    )
    base_learning_rate: ClassVar[float] = 1.3e-5
    width_exponent: ClassVar[float] = 1.68

    method: Literal["pissa"] = "pissa"
    rank: int = Field(default=16, ge=1, le=4096, description="r, the width of the trained factors.")

    @property
    def pair_rank(self) -> int:
        """2r: the difference of two products."""
        return 2 * self.rank
