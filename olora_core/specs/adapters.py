"""What may be asked of each method; a new one is one class here and one line in ADAPTER_SPECS."""

import math
import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from ..errors import SpecError
from .base import Auto, Spec

MAX_LEARNING_RATE = 10.0
MAX_EXPORT_RANK = 512
"""The widest pair that servers accept (vLLM's largest `--max-lora-rank`)."""
WHERE_TOO_WIDE = (
    "let adapter.export_rank truncate the export, or take the whole model with adapter.export = 'merged'"
)
"""What helps whatever the method."""


class AdapterSpec(Spec):
    """What every low-rank method shares."""

    summary: ClassVar[str]
    paper: ClassVar[str]
    cost: ClassVar[str]
    """What it trains and what it exports, as a sentence. W is out×in."""
    choose: ClassVar[str]
    """When it is the one to take, as a sentence."""
    base_learning_rate: ClassVar[float]
    width_exponent: ClassVar[float]

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
        description="What is left at the end: a LoRA for the untouched base, or the whole model, the update "
        "merged into its weights.",
    )

    @field_validator("target_modules")
    @classmethod
    def _targets_can_match(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not value:
            raise ValueError("'auto' or at least one module name")
        if isinstance(value, str) and value != "auto":
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"a regular expression ({error})") from None
        return value

    @property
    def scale(self) -> float:
        """s of `delta(x) = s (...)`: alpha / r, or alpha / sqrt(r) with rsLoRA."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    @property
    def pair_rank(self) -> int:
        """k of the exact pair `ΔW = B A` (B out×k, A k×in) that an adapter of this method exports at most.

        Where k depends on the layers, at least this: the method checks it once they are known.
        """
        return self.rank

    @property
    def has_pair(self) -> bool:
        """Whether an adapter of this method is a LoRA of some rank."""
        return True

    def is_too_wide(self, pair_rank: int) -> bool:
        """Whether a pair of that rank would be exported, and no server could load it."""
        return self.export == "adapter" and self.export_rank is None and pair_rank > MAX_EXPORT_RANK

    @classmethod
    def options(cls) -> dict[str, Any]:
        """The JSON schema of an `adapter` object of this method: every option with default and meaning."""
        schema = cls.model_json_schema()
        options = {
            name: {key: value for key, value in option.items() if key != "title"}
            for name, option in schema["properties"].items()
        }
        return {"type": "object", "properties": options, "additionalProperties": False}


class FactorsSpec(AdapterSpec):
    """What methods share that train two plain factors, A (r×in) and B (out×r)."""

    lora_plus_ratio: float = Field(
        default=1.0,
        gt=0,
        le=1024,
        description="LoRA+: B's learning rate as a multiple of A's, which is the job's (arXiv 2402.12354).",
    )


class OLoRASpec(FactorsSpec):
    """OLoRA: factors that start from the thin QR of the pretrained weight (arXiv 2406.01775)."""

    summary: ClassVar[str] = "LoRA whose factors start from the QR decomposition of the pretrained weight."
    paper: ClassVar[str] = "arXiv 2406.01775"
    cost: ClassVar[str] = (
        "Trains r (in + out) numbers a layer and keeps as many frozen beside them; exports a LoRA of rank 2r."
    )
    choose: ClassVar[str] = (
        "The default: training starts in directions that the pretrained weight already has, at a lower "
        "learning rate than LoRA's."
    )
    base_learning_rate: ClassVar[float] = 1e-4
    width_exponent: ClassVar[float] = 0.7525

    method: Literal["olora"] = "olora"
    rank: int = Field(default=32, ge=1, le=4096, description="r, the width of the trained factors.")

    @property
    def pair_rank(self) -> int:
        """2r: the difference of two products."""
        return 2 * self.rank


class LoRASpec(FactorsSpec):
    """LoRA: a random and a zero factor beside the frozen weight (arXiv 2106.09685)."""

    summary: ClassVar[str] = "Two thin factors beside every frozen weight, one random, one zero."
    paper: ClassVar[str] = "arXiv 2106.09685"
    cost: ClassVar[str] = "Trains r (in + out) numbers a layer; exports a LoRA of rank r."
    choose: ClassVar[str] = (
        "For the smallest file at a given rank, for servers that take low ranks only, and to compare the "
        "others with."
    )
    base_learning_rate: ClassVar[float] = 2e-4
    width_exponent: ClassVar[float] = 0.8850

    method: Literal["lora"] = "lora"
    rank: int = Field(default=8, ge=1, le=4096, description="r, the width of the trained factors.")


class SVDSpec(FactorsSpec):
    """What methods share whose factors start from the SVD of the pretrained weight."""

    svd_iterations: int | None = Field(
        default=16,
        ge=0,
        le=64,
        description="Power iterations of the randomised SVD; null: an exact SVD, far slower on large layers.",
    )


class PiSSASpec(SVDSpec):
    """PiSSA: factors that start as the principal part of the pretrained weight (arXiv 2404.02948)."""

    summary: ClassVar[str] = "LoRA whose factors start from the largest singular values of the weight."
    paper: ClassVar[str] = "arXiv 2404.02948"
    cost: ClassVar[str] = (
        "Trains r (in + out) numbers a layer and keeps as many frozen beside them; exports a LoRA of rank 2r."
    )
    choose: ClassVar[str] = (
        "As OLoRA, where a weight's energy lies in few singular values; its start takes longer than OLoRA's."
    )
    base_learning_rate: ClassVar[float] = 1e-4
    width_exponent: ClassVar[float] = 0.7525

    method: Literal["pissa"] = "pissa"
    rank: int = Field(default=16, ge=1, le=4096, description="r, the width of the trained factors.")

    @property
    def pair_rank(self) -> int:
        """2r: the difference of two products."""
        return 2 * self.rank


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


class BALoRASpec(SVDSpec):
    """BA-LoRA: PiSSA held in check by three penalties on the logits (arXiv 2408.04556, second version)."""

    summary: ClassVar[str] = "PiSSA with penalties against drift, narrow answers and noise."
    paper: ClassVar[str] = "arXiv 2408.04556"
    cost: ClassVar[str] = (
        "Trains r (in + out) numbers a layer, with one more pass of the base and all logits for each pass; "
        "exports a LoRA of rank 2r, or r with LoRA's start."
    )
    choose: ClassVar[str] = "When data are few or noisy and the model must not drift from what it knows."
    base_learning_rate: ClassVar[float] = 2e-5
    width_exponent: ClassVar[float] = 0.8850

    method: Literal["ba_lora"] = "ba_lora"
    rank: int = Field(default=16, ge=1, le=4096, description="r, the width of the trained factors.")
    init: Literal["pissa", "lora"] = Field(
        default="pissa", description="Start from the weight's SVD, or as LoRA does."
    )
    lambda_consistency: float = Field(
        default=0.025, ge=0, description="λ1: weight of the divergence from the base; falls to a tenth."
    )
    lambda_diversity: float = Field(
        default=0.005,
        ge=0,
        description="λ2: weight of the likeliest tokens' entropy; from a fifth of the run.",
    )
    lambda_spectrum: float = Field(
        default=0.005, ge=0, description="λ3: weight of the largest singular values; from a fifth of the run."
    )
    temperature: float = Field(default=2.0, gt=0, le=100, description="τ of the divergence from the base.")
    top_tokens: int = Field(default=20, ge=2, description="K: of how many tokens the entropy is taken.")
    top_singular_values: int = Field(default=10, ge=1, description="k: how many singular values are summed.")
    spectrum_norm: Literal["frobenius", "nuclear"] = Field(
        default="frobenius", description="The norm of the logits that the sum is a share of."
    )
    center_logits: bool = Field(
        default=False, description="Subtract each row's mean before the singular values are taken."
    )

    @field_validator("init")
    @classmethod
    def _no_svd_without_its_start(cls, init: str, others: ValidationInfo) -> str:
        default = cls.model_fields["svd_iterations"].default
        if init == "lora" and others.data.get("svd_iterations", default) != default:
            raise ValueError("'pissa' where svd_iterations is given, for LoRA's start has no SVD")
        return init

    @property
    def pair_rank(self) -> int:
        """2r, the difference of two products; r with LoRA's start."""
        return self.rank if self.init == "lora" else 2 * self.rank


class PRILoRASpec(FactorsSpec):
    """PRILoRA: ranks that rise with depth, and A pruned by importance (arXiv 2401.11316)."""

    summary: ClassVar[str] = "LoRA with more rank in later layers, whose A loses its least important entries."
    paper: ClassVar[str] = "arXiv 2401.11316"
    cost: ClassVar[str] = (
        "Trains r_l (in + out) numbers in layer l, as many as LoRA of rank r in all, of which half of A ends "
        "as zeros; exports a LoRA of the last layer's rank, 1.5 r."
    )
    choose: ClassVar[str] = (
        "When later layers are thought to have more to learn than early ones, for LoRA's number of trained "
        "values. It needs some hundred steps to prune more than once or twice."
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
    prune_share: float = Field(default=0.5, ge=0, lt=1, description="Share of A that a pruning zeroes.")
    prune_every: int = Field(default=40, ge=1, description="Steps from one pruning to the next.")
    prune_group: Literal["row", "matrix"] = Field(
        default="row", description="Among which entries of A the least important are sought."
    )
    prune_at_end: bool = Field(default=True, description="Prune after the last step too.")
    regrow: bool = Field(
        default=True, description="Train pruned entries on, so that they may grow until the next pruning."
    )
    importance_decay: float = Field(
        default=0.9,
        ge=0,
        lt=1,
        description="Share that the running norm of a layer's inputs keeps each step.",
    )

    @field_validator("first_rank")
    @classmethod
    def _the_last_rank_is_positive(cls, value: int | None, info: ValidationInfo) -> int | None:
        rank = info.data.get("rank")
        if value is not None and rank is not None and value >= 2 * rank:
            raise ValueError(f"less than 2 rank = {2 * rank}, since the layers' mean rank is {rank}")
        return value

    @property
    def end_ranks(self) -> tuple[int, int]:
        """Of the first and of the last layer."""
        first = self.first_rank or max(1, self.rank // 2)
        return first, 2 * self.rank - first

    @property
    def pair_rank(self) -> int:
        return max(self.end_ranks)

    def rank_at(self, layer: int | None, layers: int) -> int:
        """Rank of block `layer` of `layers`, on a straight line between the ends, to the nearest; outside
        the blocks the mean."""
        if layer is None or layers < 2:
            return self.rank
        first, last = self.end_ranks
        steps = layers - 1
        return (2 * first * steps + 2 * (last - first) * layer + steps) // (2 * steps)

    def scale_at(self, layer_rank: int) -> float:
        rank = layer_rank if self.scale_by == "layer_rank" else self.rank
        return self.alpha / (rank**0.5 if self.rslora else rank)


class TTLoRASpec(AdapterSpec):
    """TT-LoRA: LoRA whose two factors are tensor trains (arXiv 2408.01008)."""

    summary: ClassVar[str] = "LoRA whose two factors are tensor trains, with far fewer numbers to train."
    paper: ClassVar[str] = "arXiv 2408.01008"
    cost: ClassVar[str] = (
        "Trains the r×m×r numbers of each core, 4,352 in all for a 4096×4096 weight at rank 8, where LoRA "
        "trains 65,536; exports a LoRA of rank r, as large as LoRA's."
    )
    choose: ClassVar[str] = (
        "When the trained state has to be tiny, as for many adapters kept in their native form; others have "
        "found it behind LoRA on hard tasks."
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
        description="Not of this method, whose scale does not depend on the rank.",
        json_schema_extra={"const": False},
    )
    modes: dict[int, tuple[int, ...]] | None = Field(
        default=None,
        description="How a size is factored, by size, as {768: [16, 12, 4]}: in this order for a layer's "
        "inputs, reversed for its outputs; a size that is not named, into modes of up to 16.",
    )

    @field_validator("rslora")
    @classmethod
    def _the_scale_is_alpha(cls, value: bool) -> bool:
        if value:
            raise ValueError("false, since tt_lora scales by alpha itself, whatever the rank")
        return value

    @field_validator("modes")
    @classmethod
    def _modes_multiply(cls, value: dict[int, tuple[int, ...]] | None) -> dict[int, tuple[int, ...]] | None:
        for size, modes in (value or {}).items():
            if min(modes, default=0) < 2 or math.prod(modes) != size:
                raise ValueError(f"numbers above 1 for {size} whose product is {size}")
        return value

    @property
    def scale(self) -> float:
        return self.alpha


class SoRASpec(AdapterSpec):
    """SoRA: LoRA with a gate on each component, which shrinks to exact zeros (arXiv 2311.11696)."""

    summary: ClassVar[str] = "LoRA with a trained gate on each component; gates that do not pay shrink to 0."
    paper: ClassVar[str] = "arXiv 2311.11696"
    cost: ClassVar[str] = (
        "Trains r (in + out + 1) numbers a layer; exports a LoRA as wide as the largest number of gates that "
        "a layer has left, at most r."
    )
    choose: ClassVar[str] = (
        "When nobody knows the rank: start from a generous one and let training leave each layer what it "
        "uses."
    )
    base_learning_rate: ClassVar[float] = 1.8e-4  # the authors' 8e-4, for a model 768 wide
    width_exponent: ClassVar[float] = 0.8850

    method: Literal["sora"] = "sora"
    rank: int = Field(default=16, ge=1, le=4096, description="r, the components that a layer starts with.")
    threshold: Auto | Annotated[float, Field(ge=0, le=1024)] = Field(
        default="auto",
        description="xi: every gate shrinks by this much after every step; auto: 0.5 / the run's steps.",
    )
    threshold_times_rate: bool = Field(
        default=False,
        description="Multiply the threshold by the gates' learning rate at each step; it must then be given.",
    )
    gate_learning_rate: Auto | Annotated[float, Field(ge=0, le=MAX_LEARNING_RATE)] = Field(
        default="auto",
        description="The gates' peak rate; auto: 2.5 times the threshold, or the job's own rate where the "
        "threshold is 0 or multiplied by the rate.",
    )
    gate_init: Literal["normal", "ones"] = Field(
        default="normal", description="How the gates start: drawn from N(0, 1), or all 1."
    )
    factor_decay: Auto | Annotated[float, Field(ge=0, le=1)] = Field(
        default="auto",
        description="Weight decay of both factors, never of the gates; auto: the job's weight_decay, or 0.1 "
        "where that is 0.",
    )

    @field_validator("threshold_times_rate")
    @classmethod
    def _a_factor_is_given(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("threshold") == "auto":
            raise ValueError("a threshold beside it, since auto is meant per step")
        return value


class RMLoRASpec(FactorsSpec):
    """RM-LoRA: LoRA whose factors stay near orthonormal and move a few at a time (arXiv 2407.12074)."""

    summary: ClassVar[str] = "LoRA with near-orthonormal factors, of which a random half moves at each step."
    paper: ClassVar[str] = "arXiv 2407.12074"
    cost: ClassVar[str] = (
        "Trains r (in + out) numbers a layer, of which the gradient reaches p (in + out) at a step; exports "
        "a LoRA of rank r."
    )
    choose: ClassVar[str] = (
        "For little data, where LoRA overfits: the mask curbs that, and the penalty keeps the update from "
        "using fewer directions than it has."
    )
    base_learning_rate: ClassVar[float] = 2.3e-4  # the authors' 1e-3, for a model 768 wide
    width_exponent: ClassVar[float] = 0.8850

    method: Literal["rm_lora"] = "rm_lora"
    rank: int = Field(default=8, ge=1, le=4096, description="r, the width of the trained factors.")
    moved_rank: Auto | Annotated[int, Field(ge=1, le=4096)] = Field(
        default="auto",
        description="p, the rows of A and columns of B that a step's gradient reaches; auto: half the rank.",
    )
    variant: Literal["v1", "v2"] = Field(
        default="v1", description="v1: the same p for A and B; v2: drawn for each of them."
    )
    orthogonality: float = Field(
        default=0.1, ge=0, le=1024, description="lambda, the weight of the penalty; 0 is none."
    )
    orthogonality_norm: Literal["plain", "squared"] = Field(
        default="plain", description="Frobenius norms from orthonormal are averaged as they are, or squared."
    )
    init: Literal["kaiming", "gaussian"] = Field(
        default="kaiming",
        description="How A starts: uniform in 1 / sqrt(in), or Gaussian with deviation 0.02.",
    )

    @field_validator("moved_rank")
    @classmethod
    def _no_more_than_there_are(cls, value: Auto | int, info: ValidationInfo) -> Auto | int:
        rank = info.data.get("rank", value)
        if value != "auto" and value > rank:
            raise ValueError(f"at most rank, {rank}")
        return value

    @property
    def moved(self) -> int:
        """p as a number."""
        return -(-self.rank // 2) if self.moved_rank == "auto" else self.moved_rank


class AdaLoRASpec(AdapterSpec):
    """AdaLoRA: a falling budget of components, for which all layers compete (arXiv 2303.10512)."""

    summary: ClassVar[str] = (
        "SVD-like updates whose components compete, over all layers, for a falling budget."
    )
    paper: ClassVar[str] = "arXiv 2303.10512"
    cost: ClassVar[str] = (
        "Trains r (in + out + 1) numbers a layer and keeps two more for each of them; exports a LoRA as wide "
        "as the largest number of components that a layer has kept, at most r."
    )
    choose: ClassVar[str] = (
        "When a small adapter should spend its rank where it matters, in a run long enough to find out: it "
        "fits more slowly than LoRA."
    )
    base_learning_rate: ClassVar[float] = 1e-3
    width_exponent: ClassVar[float] = 0.8850

    method: Literal["adalora"] = "adalora"
    rank: int = Field(default=12, ge=1, le=4096, description="r, the components that a layer starts with.")
    alpha: float = Field(
        default=16,
        gt=0,
        le=65536,
        description="The update is scaled by alpha / rank, also once fewer are left.",
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
    beta1: float = Field(default=0.85, gt=0, lt=1, description="How slowly the smoothed importance moves.")
    beta2: float = Field(default=0.85, gt=0, lt=1, description="How slowly its uncertainty moves.")
    orthogonality: float = Field(
        default=0.1, ge=0, le=1024, description="gamma, the weight of the penalty; 0 is none."
    )
    orthogonality_norm: Literal["plain", "squared_sum"] = Field(
        default="plain",
        description="Frobenius norms from orthonormal are averaged as they are, or squared and summed.",
    )

    @field_validator("rslora")
    @classmethod
    def _has_its_own_scale(cls, value: bool) -> bool:
        if value:
            raise ValueError("false, since the scale of AdaLoRA is alpha / rank; raise alpha instead")
        return value

    @field_validator("target_rank")
    @classmethod
    def _no_more_than_there_are(cls, value: Auto | int, info: ValidationInfo) -> Auto | int:
        rank = info.data.get("rank", value)
        if value != "auto" and value > rank:
            raise ValueError(f"at most rank, {rank}")
        return value

    @property
    def target(self) -> int:
        """target_rank as a number; the paper's budget starts at one and a half times its end."""
        return max(1, 2 * self.rank // 3) if self.target_rank == "auto" else self.target_rank

    @property
    def scale(self) -> float:
        """c, as the reference divides."""
        return self.alpha / (self.rank + 1e-5)


Start = Literal["kaiming", "gaussian"]


class RoundsSpec(AdapterSpec):
    """What methods share that train one pair of factors after another."""

    init: Start = Field(
        default="kaiming",
        description="How A of every pair is drawn: evenly up to 1/sqrt(in), or normally, deviation 1/rank.",
    )


class COLASpec(RoundsSpec):
    """COLA, Chain of LoRA: one LoRA after another, each on top of those before (arXiv 2401.04151)."""

    summary: ClassVar[str] = "A chain of LoRAs, trained one after another, whose sum has the rank of all."
    paper: ClassVar[str] = "arXiv 2401.04151"
    cost: ClassVar[str] = (
        "Trains r (in + out) numbers a layer at a time and keeps the finished links frozen beside them; "
        "exports a LoRA of the links' ranks together, 3r by default."
    )
    choose: ClassVar[str] = (
        "For an update of higher rank with the optimizer's memory of one small LoRA, on jobs of some hundred "
        "steps and more."
    )
    base_learning_rate: ClassVar[float] = 5e-4
    width_exponent: ClassVar[float] = 0.8850

    method: Literal["cola"] = "cola"
    rank: int = Field(default=8, ge=1, le=4096, description="r, the width of a link's factors.")
    alpha: float = Field(
        default=16, gt=0, le=65536, description="A link's update is scaled by alpha / its rank."
    )
    links: int = Field(default=3, ge=1, le=64, description="M, how many LoRAs are trained. 1 is LoRA.")
    link_shares: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(
        default=None, description="Shares of the steps that the links get, as [3, 2]; null: equal ones."
    )
    link_ranks: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        default=None, description="Rank of each link, at most `rank`; null: `rank` for all."
    )
    lr_restart: Literal["link", "never"] = Field(
        default="link", description="Run the learning-rate schedule anew, warm-up included, over each link."
    )

    @field_validator("link_shares", "link_ranks")
    @classmethod
    def _one_for_each_link(cls, value: tuple[Any, ...] | None, info: ValidationInfo) -> Any:
        links, rank = info.data.get("links"), info.data.get("rank")
        if value is None or links is None or rank is None:
            return value
        if len(value) != links:
            raise ValueError(f"one value for each of the {links} links")
        if info.field_name == "link_ranks" and max(value) > rank:
            raise ValueError(f"ranks up to adapter.rank = {rank}")
        return value

    @property
    def ranks(self) -> tuple[int, ...]:
        return self.link_ranks or (self.rank,) * self.links

    @property
    def shares(self) -> tuple[float, ...]:
        return self.link_shares or (1.0,) * self.links

    @property
    def pair_rank(self) -> int:
        """Of all links."""
        return sum(self.ranks)

    def scale_of(self, rank: int) -> float:
        """s_j of a link of that rank."""
        return self.alpha / (rank**0.5 if self.rslora else rank)


class XGBLoRASpec(RoundsSpec):
    """XGBLoRA: gradient boosting, with LoRAs of a few blocks as weak learners (arXiv 2410.19694)."""

    summary: ClassVar[str] = "Many rounds of rank-1 LoRAs on a few random blocks each, which add up."
    paper: ClassVar[str] = "arXiv 2410.19694"
    cost: ClassVar[str] = (
        "Trains r (in + out) numbers a layer at a time, of a third of the blocks, and keeps those of every "
        "finished round; exports a LoRA of r times the rounds that drew a layer, about 30 at most by default."
    )
    choose: ClassVar[str] = "For long jobs, when an update of high rank is to come of very small steps."
    base_learning_rate: ClassVar[float] = 2e-4
    width_exponent: ClassVar[float] = 0.8850

    method: Literal["xgblora"] = "xgblora"
    rank: int = Field(default=1, ge=1, le=4096, description="r, the width of a round's factors.")
    alpha: float = Field(default=2, gt=0, le=65536, description="The update is scaled by alpha / rank.")
    layers_per_round: int | None = Field(
        default=None,
        ge=1,
        description="Blocks that a round draws, all if there are fewer; null: a third, rounded up.",
    )
    steps_per_round: int | None = Field(
        default=None, ge=1, description="Steps of a round; null: a 64th of the job's, at least 16."
    )
    boosting_rate: float = Field(default=1.0, ge=0, le=1, description="Times what a finished round adds.")
    ramp_steps: int | None = Field(
        default=None,
        ge=1,
        description="Steps over which the rate rises in later rounds; null: a tenth of a round, 1 to 10.",
    )


class MoRASpec(AdapterSpec):
    """MoRA: one square matrix between two fixed foldings (arXiv 2405.12130)."""

    summary: ClassVar[str] = (
        "A square matrix in place of two thin factors: a far higher rank for as many trainable parameters."
    )
    paper: ClassVar[str] = "arXiv 2405.12130"
    cost: ClassVar[str] = (
        "Trains about r (in + out) numbers a layer, as one square matrix; exports a LoRA as wide as that "
        "matrix, 256 for a 4096×4096 weight at rank 8, and twice as wide with restarts; of type 6, the whole "
        "model."
    )
    choose: ClassVar[str] = (
        "For facts to remember, such as continued pretraining on new texts, where a low rank is what holds "
        "LoRA back, and where the server takes wide adapters."
    )
    base_learning_rate: ClassVar[float] = 3e-4
    width_exponent: ClassVar[float] = 0.8850

    method: Literal["mora"] = "mora"
    rank: int = Field(
        default=8, ge=1, le=4096, description="r, of the LoRA that would train as many numbers."
    )
    alpha: float = Field(
        default=1,
        description="Not of this method, whose scale is 1.",
        json_schema_extra={"const": 1},
    )
    rslora: bool = Field(
        default=False,
        description="Not of this method, whose scale is 1.",
        json_schema_extra={"const": False},
    )
    dropout: float = Field(default=0.05, ge=0, lt=1, description="Dropout on the adapter's input.")
    type: Literal[1, 2, 3, 4, 6] = Field(
        default=1,
        description="How inputs are summed, and outputs filled: 1 by turns, tiled; 2 neighbours, repeated; "
        "3 neighbours, tiled; 4 by turns, repeated; 6 a block at a time, each rotated, and merged only.",
    )
    restart_every: int = Field(
        default=0,
        ge=0,
        description="ReMoRA: steps after which the matrix is kept and a new one begun; 0 is never.",
    )
    restart_types: tuple[Literal[1, 2, 3, 4], ...] = Field(
        default=(1, 2, 3, 4),
        min_length=1,
        description="ReMoRA: the types that follow each other, over and over, beginning with `type`.",
    )
    ramp_steps: int = Field(
        default=50,
        ge=1,
        description="ReMoRA: steps over which the rate rises after a restart, at most all until the next.",
    )

    @field_validator("alpha")
    @classmethod
    def _the_scale_is_one(cls, value: float) -> float:
        if value != 1:
            raise ValueError("no alpha, since the scale of mora is 1; leave it out, or change the rate")
        return value

    @field_validator("rslora")
    @classmethod
    def _whatever_the_rank(cls, value: bool) -> bool:
        if value:
            raise ValueError("false, since the scale of mora is 1, whatever the rank; leave it out")
        return value

    @field_validator("restart_every")
    @classmethod
    def _no_blocks_to_keep(cls, value: int, info: ValidationInfo) -> int:
        if value and info.data.get("type") == 6:
            raise ValueError("0 with adapter.type = 6, which has no restarts; use another type")
        return value

    @field_validator("restart_types")
    @classmethod
    def _begin_somewhere(cls, value: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        type = info.data.get("type")
        if info.data.get("restart_every") and type not in (None, *value):
            raise ValueError(f"types among which is adapter.type = {type}, that of the first matrix")
        return value

    @property
    def scale(self) -> float:
        return 1.0

    @property
    def has_pair(self) -> bool:
        return self.type != 6


AnyAdapterSpec = Annotated[
    OLoRASpec
    | LoRASpec
    | PiSSASpec
    | MELoRASpec
    | BALoRASpec
    | PRILoRASpec
    | TTLoRASpec
    | SoRASpec
    | RMLoRASpec
    | AdaLoRASpec
    | COLASpec
    | XGBLoRASpec
    | MoRASpec,
    Field(discriminator="method"),
]
ADAPTER_SPECS: dict[str, type[AdapterSpec]] = {
    "olora": OLoRASpec,
    "lora": LoRASpec,
    "pissa": PiSSASpec,
    "melora": MELoRASpec,
    "ba_lora": BALoRASpec,
    "prilora": PRILoRASpec,
    "tt_lora": TTLoRASpec,
    "sora": SoRASpec,
    "adalora": AdaLoRASpec,
    "rm_lora": RMLoRASpec,
    "cola": COLASpec,
    "xgblora": XGBLoRASpec,
    "mora": MoRASpec,
}
DEFAULT_METHOD = "olora"


def check_export(spec: AdapterSpec) -> None:
    """Refuses, before any training, an export that there is none of, and one that no server could load."""
    if spec.export == "merged":
        if spec.export_rank is not None:
            raise SpecError(
                "adapter.export_rank truncates an adapter, and adapter.export = 'merged' leaves none; leave "
                "one of the two out.",
                param="adapter.export_rank",
            )
        return
    if not spec.has_pair:
        raise SpecError(
            "adapter.export = 'adapter': an update of adapter.type = 6 is no LoRA of any rank that servers "
            "load; take the whole model with adapter.export = 'merged', or another adapter.type.",
            param="adapter.export",
        )
    if spec.export_rank is not None and spec.export_rank > MAX_EXPORT_RANK:
        raise SpecError(
            f"adapter.export_rank = {spec.export_rank} is more than servers load; "
            f"use at most {MAX_EXPORT_RANK}.",
            param="adapter.export_rank",
        )
    if spec.is_too_wide(spec.pair_rank):
        widest = MAX_EXPORT_RANK * spec.rank // spec.pair_rank
        raise SpecError(
            f"adapter.rank = {spec.rank} exports a LoRA of rank {spec.pair_rank}, and servers load at most "
            f"{MAX_EXPORT_RANK}; use a rank up to {widest}, {WHERE_TOO_WIDE}.",
            param="adapter.rank",
        )
