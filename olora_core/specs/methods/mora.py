"""The options of MoRA."""

from typing import ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from .base import AdapterSpec


class MoRASpec(AdapterSpec):
    """MoRA: one square matrix between two fixed foldings (arXiv 2405.12130)."""

    title: ClassVar[str] = "MoRA"
    summary: ClassVar[str] = (
        "A square matrix instead of two thin factors: a far higher rank with as many trainable parameters."
    )
    paper: ClassVar[str] = "arXiv 2405.12130"
    cost: ClassVar[str] = (
        "Trains about r (in + out) parameters per layer, as one square matrix; exports a LoRA of that "
        "matrix's rank, 256 for a 4096×4096 weight at rank 8, and twice that with restarts; with type 6, "
        "the whole model."
    )
    choose: ClassVar[str] = (
        "For learning facts, as in continued pretraining on new texts, where a low rank holds LoRA back, and "
        "where the server takes adapters of high rank. The default is type 1, which exports exactly; at low "
        "ranks its authors use type 6, which can only be exported merged."
    )
    base_learning_rate: ClassVar[float] = 3e-4
    width_exponent: ClassVar[float] = 0.8850

    method: Literal["mora"] = "mora"
    rank: int = Field(
        default=8, ge=1, le=4096, description="r, the rank of a LoRA with as many trainable parameters."
    )
    alpha: float = Field(
        default=1,
        description="Not used by this method, whose scale is 1.",
        json_schema_extra={"const": 1},
    )
    rslora: bool = Field(
        default=False,
        description="Not used by this method, whose scale is 1.",
        json_schema_extra={"const": False},
    )
    dropout: float = Field(default=0.05, ge=0, lt=1, description="Dropout on the adapter's input.")
    type: Literal[1, 2, 3, 4, 6] = Field(
        default=1,
        description="How inputs are summed and outputs filled: 1 by turns, tiled; 2 neighbours, repeated; "
        "3 neighbours, tiled; 4 by turns, repeated; 6 block by block, each rotated (what the authors use at "
        "low ranks; export merged only).",
    )
    restart_every: int = Field(
        default=0,
        ge=0,
        description="ReMoRA: number of steps after which the matrix is kept and a new one starts; 0: never.",
    )
    restart_types: tuple[Literal[1, 2, 3, 4], ...] = Field(
        default=(1, 2, 3, 4),
        min_length=1,
        description="ReMoRA: the cycle of types, starting at `type`.",
    )
    ramp_steps: int = Field(
        default=50,
        ge=1,
        description="ReMoRA: steps over which the rate rises after a restart, at most until the next.",
    )

    @field_validator("alpha")
    @classmethod
    def _the_scale_is_one(cls, value: float) -> float:
        if value != 1:
            raise ValueError("must be left out: the scale of mora is 1; change the learning rate instead")
        return value

    @field_validator("rslora")
    @classmethod
    def _whatever_the_rank(cls, value: bool) -> bool:
        if value:
            raise ValueError("must be false, since the scale of mora is 1, whatever the rank")
        return value

    @field_validator("restart_every")
    @classmethod
    def _no_blocks_to_keep(cls, value: int, info: ValidationInfo) -> int:
        if value and info.data.get("type") == 6:
            raise ValueError("must be 0 with adapter.type = 6, which has no restarts")
        return value

    @field_validator("restart_types")
    @classmethod
    def _begin_somewhere(cls, value: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        type = info.data.get("type")
        if info.data.get("restart_every") and type not in (None, *value):
            raise ValueError(f"must include adapter.type = {type}, the type of the first matrix")
        return value

    @property
    def scale(self) -> float:
        return 1.0

    @property
    def has_pair(self) -> bool:
        return self.type != 6
