"""The options of TT-LoRA."""

import math
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from .base import AdapterSpec


class TTLoRASpec(AdapterSpec):
    """TT-LoRA: LoRA whose two factors are tensor trains (arXiv 2408.01008)."""

    title: ClassVar[str] = "TT-LoRA"
    summary: ClassVar[str] = "LoRA whose two factors are tensor trains, with far fewer trainable parameters."
    paper: ClassVar[str] = "arXiv 2408.01008"
    cost: ClassVar[str] = (
        "Trains r×m×r parameters per core, 4,352 in all for a 4096×4096 weight at rank 8, where LoRA trains "
        "65,536; exports a LoRA of rank r, as large as LoRA's."
    )
    choose: ClassVar[str] = (
        "When the trained state must be tiny, as for many adapters kept in their native form; others have "
        "found it worse than LoRA on hard tasks. Unlike its authors', it starts at the base and "
        "adapts all linear layers, so their rates do not carry over."
    )
    base_learning_rate: ClassVar[float] = 1e-3
    width_exponent: ClassVar[float] = 0.3590

    method: Literal["tt_lora"] = "tt_lora"
    rank: int = Field(default=8, ge=1, le=4096, description="r, the bond between two cores.")
    alpha: float = Field(
        default=16, gt=0, le=65536, description="The update is scaled by alpha itself, whatever the rank."
    )
    rslora: bool = Field(
        default=False,
        description="Not used by this method, whose scale does not depend on the rank.",
        json_schema_extra={"const": False},
    )
    modes: dict[int, tuple[int, ...]] | None = Field(
        default=None,
        description="Factors of layer sizes, such as {768: [16, 12, 4]}: in this order for inputs, "
        "reversed for outputs; sizes not listed are factored into modes of up to 16.",
    )

    @field_validator("rslora")
    @classmethod
    def _the_scale_is_alpha(cls, value: bool) -> bool:
        if value:
            raise ValueError("must be false, since tt_lora scales by alpha itself, whatever the rank")
        return value

    @field_validator("modes")
    @classmethod
    def _modes_multiply(cls, value: dict[int, tuple[int, ...]] | None) -> dict[int, tuple[int, ...]] | None:
        for size, modes in (value or {}).items():
            if min(modes, default=0) < 2 or math.prod(modes) != size:
                raise ValueError(f"must give {size} factors above 1 whose product is {size}")
        return value

    @property
    def scale(self) -> float:
        return self.alpha
