"""The options of COLA."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from .base import RoundsSpec


class COLASpec(RoundsSpec):
    """COLA, Chain of LoRA: one LoRA after another, each on top of those before (arXiv 2401.04151)."""

    title: ClassVar[str] = "COLA"
    summary: ClassVar[str] = "A chain of LoRAs, trained one after another, whose sum has the rank of all."
    paper: ClassVar[str] = "arXiv 2401.04151"
    cost: ClassVar[str] = (
        "Trains r (in + out) parameters per layer at a time, with the finished links frozen beside them; "
        "exports a LoRA whose rank is the sum of the links', 3r by default."
    )
    choose: ClassVar[str] = (
        "For an update of higher rank with the optimizer memory of one small LoRA, in jobs of some hundred "
        "steps or more."
    )
    base_learning_rate: ClassVar[float] = 5e-4
    width_exponent: ClassVar[float] = 0.8850

    method: Literal["cola"] = "cola"
    rank: int = Field(default=8, ge=1, le=4096, description="r, the width of a link's factors.")
    alpha: float = Field(
        default=16, gt=0, le=65536, description="A link's update is scaled by alpha / its rank."
    )
    links: int = Field(default=3, ge=1, le=64, description="M, the number of LoRAs; 1 is LoRA itself.")
    link_shares: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(
        default=None, description="Each link's share of the steps, such as [3, 2]; null: equal shares."
    )
    link_ranks: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        default=None, description="Rank of each link, at most `rank`; null: `rank` for all."
    )
    lr_restart: Literal["link", "never"] = Field(
        default="link", description="Restart the learning-rate schedule, with its warm-up, for each link."
    )

    @field_validator("link_shares", "link_ranks")
    @classmethod
    def _one_for_each_link(cls, value: tuple[Any, ...] | None, info: ValidationInfo) -> Any:
        links, rank = info.data.get("links"), info.data.get("rank")
        if value is None or links is None or rank is None:
            return value
        if len(value) != links:
            raise ValueError(f"must have one value for each of the {links} links")
        if info.field_name == "link_ranks" and max(value) > rank:
            raise ValueError(f"must be ranks of at most adapter.rank = {rank}")
        return value

    @property
    def ranks(self) -> tuple[int, ...]:
        return self.link_ranks or (self.rank,) * self.links

    @property
    def shares(self) -> tuple[float, ...]:
        return self.link_shares or (1.0,) * self.links

    @property
    def pair_rank(self) -> int:
        """The sum over the links."""
        return sum(self.ranks)

    def scale_of(self, rank: int) -> float:
        """s_j of a link of that rank."""
        return self.alpha / (rank**0.5 if self.rslora else rank)

    @property
    def scale_range(self) -> tuple[float, float]:
        return self.scale_of(max(self.ranks)), self.scale_of(min(self.ranks))
