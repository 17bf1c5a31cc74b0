"""Everything a caller may ask for, said once and free of torch.

The REST body, the row, the command line, the list of methods and the adapter's manifest are views of the
models below. `read_spec` turns loose input into a `TrainSpec`; `resolve` turns "auto" into numbers.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar, cast, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from .errors import SpecError

Auto = Literal["auto"]
MAX_SEED = 2**31 - 1
MAX_LEARNING_RATE = 10.0
MAX_CONTEXT = 2**20
MAX_EXPORT_RANK = 512
"""The widest pair that servers accept (vLLM's largest `--max-lora-rank`)."""
REFERENCE_WIDTH = 4096
"""Hidden size at which a method's `base_learning_rate` holds; see `learning_rate_for`."""


class Spec(BaseModel):
    """Refuses unknown names and non-finite numbers; never changes once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


SpecT = TypeVar("SpecT", bound=Spec)


class AdapterSpec(Spec):
    """What every low-rank method shares."""

    summary: ClassVar[str]
    paper: ClassVar[str]
    base_learning_rate: ClassVar[float]
    width_exponent: ClassVar[float]

    method: str
    rank: int = Field(ge=1, le=4096, description="r, the width of the trained factors.")
    alpha: float = Field(gt=0, le=65536, description="The update is scaled by alpha / rank.")
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
        """k of the exact pair `ΔW = B A` (B out×k, A k×in) that an adapter of this method exports."""
        return self.rank


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
    base_learning_rate: ClassVar[float] = 1e-4
    width_exponent: ClassVar[float] = 0.7525

    method: Literal["olora"] = "olora"
    rank: int = Field(default=32, ge=1, le=4096, description="r, the width of the trained factors.")
    alpha: float = Field(default=16, gt=0, le=65536, description="The update is scaled by alpha / rank.")

    @property
    def pair_rank(self) -> int:
        """2r: the difference of two products."""
        return 2 * self.rank


class LoRASpec(FactorsSpec):
    """LoRA: a random and a zero factor beside the frozen weight (arXiv 2106.09685)."""

    summary: ClassVar[str] = "Two thin factors beside every frozen weight, one random, one zero."
    paper: ClassVar[str] = "arXiv 2106.09685"
    base_learning_rate: ClassVar[float] = 2e-4
    width_exponent: ClassVar[float] = 0.8850

    method: Literal["lora"] = "lora"
    rank: int = Field(default=8, ge=1, le=4096, description="r, the width of the trained factors.")
    alpha: float = Field(default=16, gt=0, le=65536, description="The update is scaled by alpha / rank.")


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


AnyAdapterSpec = Annotated[OLoRASpec | LoRASpec | COLASpec | XGBLoRASpec, Field(discriminator="method")]
ADAPTER_SPECS: dict[str, type[AdapterSpec]] = {
    "olora": OLoRASpec,
    "lora": LoRASpec,
    "cola": COLASpec,
    "xgblora": XGBLoRASpec,
}
DEFAULT_METHOD = "olora"
AUTO_BETA = 0.1
"""The value of most of the DPO paper's experiments."""


def check_export_rank(spec: AdapterSpec) -> None:
    """Refuses, before any training, an adapter that no server could load."""
    if spec.export_rank is not None and spec.export_rank > MAX_EXPORT_RANK:
        raise SpecError(
            f"adapter.export_rank = {spec.export_rank} is more than servers load; "
            f"use at most {MAX_EXPORT_RANK}.",
            param="adapter.export_rank",
        )
    if spec.export_rank is None and spec.pair_rank > MAX_EXPORT_RANK:
        widest = MAX_EXPORT_RANK * spec.rank // spec.pair_rank
        raise SpecError(
            f"adapter.rank = {spec.rank} exports a LoRA of rank {spec.pair_rank}, and servers load at most "
            f"{MAX_EXPORT_RANK}; use a rank up to {widest}, or let adapter.export_rank truncate the export.",
            param="adapter.rank",
        )


Quantization = Literal["none", "nf4", "int8", "torchao-int8", "torchao-fp8"]


class Hyperparameters(Spec):
    """How to train; OpenAI's three names first, then ours."""

    n_epochs: Auto | Annotated[int, Field(ge=1, le=50)] = Field(
        default="auto", description="Passes over the data."
    )
    batch_size: Auto | Annotated[int, Field(ge=1, le=256)] = Field(
        default="auto", description="Examples in one optimizer step."
    )
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0)] = Field(
        default="auto", description="Times the method's own rate for a model of this size."
    )
    learning_rate: Auto | Annotated[float, Field(gt=0, le=MAX_LEARNING_RATE)] = Field(
        default="auto", description="Absolute peak rate, instead of the multiplier."
    )
    schedule: Literal["linear", "cosine", "constant"] = Field(
        default="linear", description="How the rate falls after the warm-up."
    )
    warmup_ratio: float = Field(default=0.03, ge=0, le=1, description="Share of the steps that warm up.")
    weight_decay: float = Field(default=0.0, ge=0, le=1, description="AdamW's decoupled weight decay.")
    max_grad_norm: float = Field(default=1.0, gt=0, description="The gradient's norm is clipped to this.")
    neftune_alpha: float = Field(
        default=0.0,
        ge=0,
        le=1000,
        description="Noise on the embedded tokens while training, supervised only; 0 is none "
        "(NEFTune, arXiv 2310.05914).",
    )
    context_length: Auto | Annotated[int, Field(ge=16, le=MAX_CONTEXT)] = Field(
        default="auto", description="Tokens of an example that are kept; auto: the model's own context."
    )
    max_steps: int | None = Field(default=None, ge=1, description="Stop after this many optimizer steps.")
    eval_steps: int | None = Field(
        default=None,
        ge=1,
        description="Evaluate the whole validation file also every so many steps; null: at epochs' ends.",
    )
    early_stopping_patience: int | None = Field(
        default=None,
        ge=1,
        description="Stop after so many evaluations in a row without a lower validation loss, and export the "
        "adapter of the lowest one; null: never.",
    )
    early_stopping_min_delta: float = Field(
        default=0.0, ge=0, description="By how much a validation loss must be lower to count as lower."
    )
    samples: int = Field(
        default=4,
        ge=0,
        le=16,
        description="Rows that the base and the tuned model answer at the end, for people.",
    )
    micro_batch_size: Auto | Annotated[int, Field(ge=1, le=256)] = Field(
        default="auto",
        description="Most examples in one forward pass; gradients accumulate up to batch_size.",
    )
    micro_batch_tokens: Auto | Annotated[int, Field(ge=16, le=MAX_CONTEXT)] = Field(
        default="auto",
        description="Most tokens in one forward pass, padding included; auto: by an estimate of the memory.",
    )
    packing: Auto | bool = Field(
        default="auto",
        description="Lay a pass's examples end to end in one row, unpadded; auto: where that is exact.",
    )
    gradient_checkpointing: Auto | bool = Field(
        default="auto",
        description="Compute each block once more in the backward to save memory; auto: only if it must be.",
    )
    label_smoothing: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of each target's probability that is spread evenly (arXiv 1512.00567).",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="Compute precision; auto times both on the device at hand."
    )
    quantization: Quantization = Field(
        default="none",
        description="How the frozen base holds its weights: nf4, int8 (bitsandbytes), torchao-int8, "
        "torchao-fp8, or none: as its files do.",
    )
    sharding: Auto | Literal["none", "full"] = Field(
        default="auto",
        description="On several devices: spread the base over them (full), or keep it whole on each.",
    )
    beta: Auto | Annotated[float, Field(gt=0, le=2)] | None = Field(
        default=None, description="dpo alone: how firmly the model is held to the base; auto is 0.1."
    )


TrainingType = Literal["supervised", "dpo"]


class TrainSpec(Spec):
    """One training run, without its files: what the core is asked for."""

    model: str = Field(min_length=1, description="Id of the base model.")
    type: TrainingType = Field(
        default="supervised",
        description="Learn answers, or which of two answers to prefer (DPO, arXiv 2305.18290).",
    )
    adapter: AnyAdapterSpec = Field(default_factory=OLoRASpec)
    hyperparameters: Hyperparameters = Field(default_factory=Hyperparameters)
    seed: int = Field(default=0, ge=0, le=MAX_SEED)


def check_validation(spec: TrainSpec, *, given: bool, prefix: str = "hyperparameters") -> None:
    """Refuses options that look at a validation file where none is `given`."""
    for name in ("early_stopping_patience", "eval_steps"):
        if getattr(spec.hyperparameters, name) is not None and not given:
            raise SpecError(
                f"{prefix}.{name} looks at the validation loss, and there is no validation_file; "
                "give one, or leave the option out.",
                param=f"{prefix}.{name}",
            )


HYPERPARAMETER_ALIASES = {"lr": "learning_rate", "epochs": "n_epochs", "lr_scheduler_type": "schedule"}
ADAPTER_ALIASES = {
    "lora_r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_target_modules": "target_modules",
    "r": "rank",
}


def read_spec(
    *,
    model: str,
    type: str = "supervised",
    hyperparameters: Mapping[str, Any] | None = None,
    adapter: Mapping[str, Any] | None = None,
    seed: int = 0,
    prefix: str = "hyperparameters",
) -> TrainSpec:
    """Reads loose input into a spec.

    `hyperparameters` may also carry the adapter's options (`rank`, `lora_r`, …), as callers of hosted
    services send them. `prefix` is the caller's name for that object, so that an error's `param` fits.

    Raises SpecError, naming the place, what is allowed and the nearest known name.
    """
    if type not in get_args(TrainingType):
        raise SpecError(
            f"method.type '{type}' is not available; use 'supervised' or 'dpo'.", param="method.type"
        )
    adapter_values: dict[str, Any] = {}
    for name, value in (adapter or {}).items():
        _put(adapter_values, ADAPTER_ALIASES.get(name, name), value, f"adapter.{name}")
    places = dict.fromkeys(adapter_values, "adapter")
    training_values: dict[str, Any] = {}
    for name, value in (hyperparameters or {}).items():
        _route_hyperparameter(name, value, training_values, adapter_values, places, prefix)
    multiplier = training_values.get("learning_rate_multiplier", "auto")
    if multiplier != "auto" and training_values.get("learning_rate", "auto") != "auto":
        raise SpecError(
            "learning_rate and learning_rate_multiplier exclude each other; give one of them.",
            param=f"{prefix}.learning_rate",
        )
    if type == "dpo" and training_values.get("beta") is None:
        training_values["beta"] = "auto"
    if type != "dpo" and training_values.get("beta") is not None:
        raise SpecError(
            f"{prefix}.beta is for method.type 'dpo', and this is '{type}'; leave it out, or ask for dpo.",
            param=f"{prefix}.beta",
        )
    chosen = _read(Hyperparameters, training_values, lambda name: prefix)
    if type == "dpo" and chosen.neftune_alpha:
        raise SpecError(
            f"{prefix}.neftune_alpha is for method.type 'supervised': dpo compares the model with the base, "
            "and noise on one side of a comparison is an error in it. Leave it out, or set it to 0.",
            param=f"{prefix}.neftune_alpha",
        )
    if chosen.early_stopping_min_delta and chosen.early_stopping_patience is None:
        raise SpecError(
            f"{prefix}.early_stopping_min_delta goes with early_stopping_patience, which says after how many "
            "evaluations to stop; give that too, or leave this out.",
            param=f"{prefix}.early_stopping_min_delta",
        )
    method = adapter_values.setdefault("method", DEFAULT_METHOD)
    if not isinstance(method, str) or method not in ADAPTER_SPECS:
        raise SpecError(
            f"adapter.method {method!r} is unknown{nearest(str(method), ADAPTER_SPECS)}. "
            f"Available: {', '.join(ADAPTER_SPECS)}.",
            param="adapter.method",
        )
    read_adapter = _read(ADAPTER_SPECS[method], adapter_values, lambda name: places.get(name, "adapter"))
    check_export_rank(read_adapter)
    return TrainSpec(
        model=model,
        type=cast(TrainingType, type),
        adapter=read_adapter,
        hyperparameters=chosen,
        seed=_read_seed(seed),
    )


def _route_hyperparameter(
    name: str,
    value: Any,
    training_values: dict[str, Any],
    adapter_values: dict[str, Any],
    places: dict[str, str],
    prefix: str,
) -> None:
    """Puts one hyperparameter where it belongs: with the loop's options, or with the adapter's."""
    if name == "lora":
        if value is not True:
            raise SpecError(
                f"{prefix}.lora: full fine-tuning is not offered, an adapter is always trained; "
                "leave 'lora' out or set it to true.",
                param=f"{prefix}.lora",
            )
        return
    target = HYPERPARAMETER_ALIASES.get(name, name)
    option = ADAPTER_ALIASES.get(name, name)
    if target in Hyperparameters.model_fields:
        values, key = training_values, target
    elif option != "method" and any(option in spec.model_fields for spec in ADAPTER_SPECS.values()):
        values, key = adapter_values, option
        places.setdefault(option, prefix)
    else:
        raise SpecError(
            f"{prefix}.{name} is unknown{nearest(name, known_hyperparameters())}.", param=f"{prefix}.{name}"
        )
    _put(values, key, value, f"{prefix}.{name}")


def _put(values: dict[str, Any], key: str, value: Any, place: str) -> None:
    """An option may stand in two places, with one value."""
    if key in values and values[key] != value:
        raise SpecError(
            f"{place} = {value!r} contradicts {key} = {values[key]!r} given elsewhere; give it once.",
            param=place,
        )
    values[key] = value


def known_hyperparameters() -> list[str]:
    """Every name that a hyperparameters object may carry, aliases included."""
    options = {name for spec in ADAPTER_SPECS.values() for name in spec.model_fields if name != "method"}
    return [
        *Hyperparameters.model_fields,
        *HYPERPARAMETER_ALIASES,
        *ADAPTER_ALIASES,
        *sorted(options),
        "lora",
    ]


def _read_seed(seed: Any) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
        raise SpecError(f"seed must be an integer from 0 to {MAX_SEED}, not {seed!r}.", param="seed")
    return seed


def _read(model: type[SpecT], values: Mapping[str, Any], place_of: Any) -> SpecT:
    for name, value in values.items():
        param = f"{place_of(name)}.{name}"
        if name not in model.model_fields:
            raise SpecError(f"{param} is unknown{nearest(name, model.model_fields)}.", param=param)
        # Python counts true as 1, pydantic too.
        annotation = model.model_fields[name].annotation
        if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
            raise SpecError(f"{param} takes a value, not true or false.", param=param)
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise spec_error(error, place_of) from None


def spec_error(error: ValidationError, place_of: Any = lambda name: "") -> SpecError:
    """The first complaint of pydantic as one sentence, with the number of the others."""
    problems = error.errors(include_url=False, include_context=False)
    name = str(problems[0]["loc"][0]) if problems[0]["loc"] else ""
    mine = [p for p in problems if p["loc"] and str(p["loc"][0]) == name] or problems[:1]
    # A field that takes "auto" or a number complains once for each; the complaint about the number says more.
    numeric = [p for p in mine if p["type"] != "literal_error"] or mine
    says_auto = len(numeric) < len(mine)
    place = place_of(name)
    param = f"{place}.{name}" if place else name
    wish = str(numeric[0]["msg"]).removeprefix("Input should be ").removeprefix("Value error, ")
    others = len({p["loc"][0] for p in problems if p["loc"]}) - 1
    message = f"{param} = {mine[0]['input']!r} does not fit: expected {wish}" + (
        ' or "auto".' if says_auto else "."
    )
    if others > 0:
        message += f" {others} more value{'s' if others > 1 else ''} did not fit either."
    return SpecError(message, param=param)


def nearest(name: str, known: Any) -> str:
    """` (did you mean 'x'?)`, or nothing when no known name is near."""
    matches = difflib.get_close_matches(str(name).lower(), list(known), n=1, cutoff=0.6)
    return f" (did you mean '{matches[0]}'?)" if matches else ""


@dataclass(frozen=True)
class Facts:
    """What "auto" depends on: known once the data are tokenised and the model's config is read."""

    examples: int
    hidden_size: int
    context_length: int
    dtype: Literal["float32", "bfloat16"] = "float32"
    devices: int = 1
    sharded: bool = False


def auto_epochs(examples: int) -> int:
    """OpenAI's public rule: 3, more for very few examples, fewer for very many."""
    if 3 * examples < 100:
        return min(25, 100 // max(1, examples))
    if 3 * examples > 25_000:
        return max(1, 25_000 // examples)
    return 3


def auto_batch_size(examples: int) -> int:
    """0.2 % of the examples, from 4 to 256."""
    return min(256, max(4, round(0.002 * examples)))


def learning_rate_for(adapter: AdapterSpec, hidden_size: int) -> float:
    """The method's own peak rate for a model of this width.

    `base (4096 / hidden)^e`, through two anchors per method: its card's rate at width 4096, and the optimum
    measured on the shipped base at width 192 (3e-3 for LoRA, 1e-3 for OLoRA).
    """
    return float(
        f"{adapter.base_learning_rate * (REFERENCE_WIDTH / hidden_size) ** adapter.width_exponent:.2g}"
    )


def resolve(spec: TrainSpec, facts: Facts) -> tuple[TrainSpec, list[str]]:
    """Turns every "auto" into a number. Returns the spec and one sentence for each decision.

    Raises SpecError when a number that follows from the request does not fit: what is resolved keeps to the
    bounds of what may be asked for.
    """
    asked, why = spec.hyperparameters, []
    chosen: dict[str, Any] = {}

    def decide(name: str, value: Any, reason: str) -> None:
        if getattr(asked, name) == "auto":
            chosen[name] = value
            why.append(f"{name} = {value} ({reason})")

    decide("n_epochs", auto_epochs(facts.examples), f"from {facts.examples} examples")
    decide("batch_size", auto_batch_size(facts.examples), "0.2 % of the examples, from 4 to 256")
    decide("context_length", facts.context_length, "the model's own context")
    decide("beta", AUTO_BETA, "DPO's usual value")
    decide("dtype", facts.dtype, "the faster one on this device")
    own_rate = learning_rate_for(spec.adapter, facts.hidden_size)
    if asked.learning_rate == "auto":
        factor = 1.0 if asked.learning_rate_multiplier == "auto" else asked.learning_rate_multiplier
        chosen["learning_rate"] = own_rate * factor
        chosen["learning_rate_multiplier"] = factor
        why.append(
            f"learning_rate = {own_rate * factor:g} ({factor:g} times {spec.adapter.method}'s own rate "
            f"{own_rate:g} for a model {facts.hidden_size} wide)"
        )
    elif asked.learning_rate_multiplier == "auto":
        chosen["learning_rate_multiplier"] = asked.learning_rate / own_rate
    batch_size = chosen.get("batch_size", asked.batch_size)
    if asked.sharding == "auto":
        chosen["sharding"] = "full" if facts.sharded else "none"
        if facts.devices > 1:
            why.append(f"sharding = {chosen['sharding']} (by the device's memory)")
    if asked.micro_batch_size == "auto":
        chosen["micro_batch_size"] = -(-batch_size // facts.devices)
    elif asked.micro_batch_size > batch_size:
        raise SpecError(
            f"hyperparameters.micro_batch_size = {asked.micro_batch_size} exceeds batch_size = {batch_size}.",
            param="hyperparameters.micro_batch_size",
        )
    if asked.context_length != "auto" and asked.context_length > facts.context_length:
        raise SpecError(
            f"hyperparameters.context_length = {asked.context_length} exceeds the model's context of "
            f"{facts.context_length} tokens.",
            param="hyperparameters.context_length",
        )
    values = asked.model_dump() | chosen
    hyperparameters = _read(Hyperparameters, values, lambda name: "hyperparameters")
    return spec.model_copy(update={"hyperparameters": hyperparameters}), why
