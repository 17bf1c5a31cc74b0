"""The base classes of the methods' specs."""

import re
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from ..base import Auto, Spec
from ..serving import MAX_EXPORT_RANK

MAX_LEARNING_RATE = 10.0
Start = Literal["kaiming", "gaussian"]


class AdapterSpec(Spec):
    """The options and texts that all methods have."""

    title: ClassVar[str]
    """The name as its paper writes it."""
    summary: ClassVar[str]
    paper: ClassVar[str]
    cost: ClassVar[str]
    """What it trains and what it exports, as sentences. W is out×in."""
    choose: ClassVar[str]
    """When to choose it, as a sentence."""
    base_learning_rate: ClassVar[float]
    """The peak rate at hidden size 4096, with the default rank and alpha; see `learning_rate_for`."""
    width_exponent: ClassVar[float]
    scale_exponent: ClassVar[float] = 0.5
    rank_exponent: ClassVar[float] = 0.36
    """How the rate falls with width, scale and rank; the last two as measured for LoRA."""

    method: str
    rank: int = Field(ge=1, le=4096, description="r, the width of the trained factors.")
    alpha: float = Field(default=16, gt=0, le=65536, description="The update is scaled by alpha / rank.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    rslora: bool = Field(default=False, description="Scale by alpha / sqrt(rank) instead (arXiv 2312.03732).")
    target_modules: Auto | str | tuple[str, ...] = Field(
        default="auto",
        description='"auto" (all linear layers of the blocks), a list of names, or a regular expression.',
    )
    export_rank: int | None = Field(
        default=None,
        ge=1,
        le=4096,
        description="Truncate the exported pair to this rank; null exports it exactly.",
    )
    export: Literal["adapter", "merged"] = Field(
        default="adapter",
        description="What is exported: a LoRA for the unchanged base, or the whole model with the update "
        "merged into its weights.",
    )

    @field_validator("target_modules")
    @classmethod
    def _targets_can_match(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not value:
            raise ValueError("must be 'auto' or at least one module name")
        if isinstance(value, str) and value != "auto":
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"must be a valid regular expression: {error}") from None
        return value

    @property
    def scale(self) -> float:
        """s of `delta(x) = s (...)`: alpha / r, or alpha / sqrt(r) with rsLoRA."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    @property
    def scale_range(self) -> tuple[float, float]:
        """The lowest and the highest s of a run, whose layers or links may have ranks of their own."""
        return self.scale, self.scale

    @property
    def pair_rank(self) -> int:
        """k, the rank of the exact pair `ΔW = B A` (B out×k, A k×in) that is exported, at most.

        Where k depends on the layers this is a lower bound, and the method checks k once they are known.
        """
        return self.rank

    @property
    def has_pair(self) -> bool:
        """Whether an adapter of this method is a LoRA of some rank."""
        return True

    def is_too_wide(self, pair_rank: int) -> bool:
        """Whether a pair of this rank would be exported that no server can load."""
        return self.export == "adapter" and self.export_rank is None and pair_rank > MAX_EXPORT_RANK

    @classmethod
    def options(cls) -> dict[str, Any]:
        """The JSON schema of an `adapter` object of this method, with defaults and descriptions."""
        schema = cls.model_json_schema()
        options = {
            name: {key: value for key, value in option.items() if key != "title"}
            for name, option in schema["properties"].items()
        }
        return {"type": "object", "properties": options, "additionalProperties": False}


class FactorsSpec(AdapterSpec):
    """The options of methods that train two plain factors, A (r×in) and B (out×r)."""

    lora_plus_ratio: float = Field(
        default=1.0,
        gt=0,
        le=1024,
        description="LoRA+: B's learning rate as a multiple of A's, which is the job's (arXiv 2402.12354).",
    )


class SVDSpec(FactorsSpec):
    """The options of methods whose factors start from the SVD of the pretrained weight."""

    scale_exponent: ClassVar[float] = 1.0
    rank_exponent: ClassVar[float] = 0.92

    svd_iterations: int | None = Field(
        default=16,
        ge=0,
        le=64,
        description="Power iterations of the randomised SVD; null: an exact SVD, much slower on large "
        "layers.",
    )


class RoundsSpec(AdapterSpec):
    """The options of methods that train one pair of factors after another."""

    init: Start = Field(
        default="kaiming",
        description="How A of every pair is drawn: uniformly up to 1/sqrt(in), or normally with deviation "
        "1/rank.",
    )
