"""The options of MELoRA."""

from typing import ClassVar, Literal

from pydantic import Field

from .base import FactorsSpec


class MELoRASpec(FactorsSpec):
    """MELoRA: a stack of mini LoRAs, each of one slice of inputs and outputs (arXiv 2402.17263)."""

    summary: ClassVar[str] = "Mini LoRAs along the diagonal: a higher rank for the same trainable parameters."
    paper: ClassVar[str] = "arXiv 2402.17263"
    cost: ClassVar[str] = (
        "Trains r (in + out) numbers a layer, however many mini LoRAs share them; exports a LoRA of rank n r "
        "that is mostly zeros."
    )
    choose: ClassVar[str] = "When very few numbers may be trained and a LoRA of as few has too low a rank."
    base_learning_rate: ClassVar[float] = 3e-4
    width_exponent: ClassVar[float] = 0.8850

    method: Literal["melora"] = "melora"
    rank: int = Field(default=1, ge=1, le=4096, description="r, the width of each mini LoRA's factors.")
    dropout: float = Field(default=0.05, ge=0, lt=1, description="Dropout on the adapter's input.")
    mini_loras: int = Field(
        default=8,
        ge=1,
        le=512,
        description="n, how many mini LoRAs a layer has; divides its inputs and its outputs. 1 is LoRA.",
    )

    @property
    def pair_rank(self) -> int:
        """n·r: both factors are block diagonal."""
        return self.mini_loras * self.rank
