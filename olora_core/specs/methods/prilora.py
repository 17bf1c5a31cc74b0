"""The options of PRILoRA."""

from typing import ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from .base import FactorsSpec


class PRILoRASpec(FactorsSpec):
    """PRILoRA: ranks that rise with depth, and A pruned by importance (arXiv 2401.11316)."""

    title: ClassVar[str] = "PRILoRA"
    summary: ClassVar[str] = "LoRA with more rank in later layers, whose A loses its least important entries."
    paper: ClassVar[str] = "arXiv 2401.11316"
    cost: ClassVar[str] = (
        "Trains r_l (in + out) parameters in layer l, in all as many as a LoRA of rank r; half of A is 0 "
        "in the end. Exports a LoRA of the last layer's rank, 1.5 r."
    )
    choose: ClassVar[str] = (
        "When later layers should learn more than early ones, with LoRA's number of trainable parameters. It "
        "takes some hundred steps to prune more than once or twice."
    )
    base_learning_rate: ClassVar[float] = 5e-4
    width_exponent: ClassVar[float] = 0.8850

    method: Literal["prilora"] = "prilora"
    rank: int = Field(default=8, ge=1, le=4096, description="r, the mean of the layers' ranks.")
    alpha: float = Field(
        default=16, gt=0, le=65536, description="A layer's update is scaled by alpha / its rank."
    )
    first_rank: int | None = Field(
        default=None,
        ge=1,
        le=4096,
        description="Rank of the first layer; the last one's is 2 rank - first_rank; null: half the rank.",
    )
    scale_by: Literal["layer_rank", "rank"] = Field(
        default="layer_rank", description="Divide alpha by the layer's own rank, or by the mean rank."
    )
    prune_share: float = Field(default=0.5, ge=0, lt=1, description="Share of A that each pruning sets to 0.")
    prune_every: int = Field(default=40, ge=1, description="Steps from one pruning to the next.")
    prune_group: Literal["row", "matrix"] = Field(
        default="row",
        description="Prune the least important entries of each row of A, or of the whole matrix.",
    )
    prune_at_end: bool = Field(default=True, description="Prune after the last step too.")
    regrow: bool = Field(
        default=True,
        description="Keep training pruned entries, so that they can grow until the next pruning.",
    )
    importance_decay: float = Field(
        default=0.9,
        ge=0,
        lt=1,
        description="Decay of the running mean of a layer's input norms.",
    )

    @field_validator("first_rank")
    @classmethod
    def _the_last_rank_is_positive(cls, value: int | None, info: ValidationInfo) -> int | None:
        rank = info.data.get("rank")
        if value is not None and rank is not None and value >= 2 * rank:
            raise ValueError(f"must be less than 2 rank = {2 * rank}, since the layers' mean rank is {rank}")
        return value

    @property
    def end_ranks(self) -> tuple[int, int]:
        """The ranks of the first and of the last layer."""
        first = self.first_rank or max(1, self.rank // 2)
        return first, 2 * self.rank - first

    @property
    def pair_rank(self) -> int:
        return max(self.end_ranks)

    def rank_at(self, layer: int | None, layers: int) -> int:
        """Rank of block number `layer` of `layers`, interpolated and rounded; outside the blocks the mean."""
        if layer is None or layers < 2:
            return self.rank
        first, last = self.end_ranks
        steps = layers - 1
        return (2 * first * steps + 2 * (last - first) * layer + steps) // (2 * steps)

    def scale_at(self, layer_rank: int) -> float:
        rank = layer_rank if self.scale_by == "layer_rank" else self.rank
        return self.alpha / (rank**0.5 if self.rslora else rank)

    @property
    def scale_range(self) -> tuple[float, float]:
        """Of the first and the last layer, the one with the higher rank first."""
        first, last = self.end_ranks
        return self.scale_at(max(first, last)), self.scale_at(min(first, last))
