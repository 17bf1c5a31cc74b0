"""A comparison: several methods on the same data, and how loose input becomes its spec."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, cast

from pydantic import Field

from ..errors import SpecError
from .adapters import ADAPTER_SPECS, AnyAdapterSpec
from .base import Auto, Spec, nearest, read
from .methods.base import MAX_LEARNING_RATE
from .methods.lora import LoRASpec
from .training import (
    ADAPTER_ALIASES,
    HYPERPARAMETER_ALIASES,
    MAX_SEED,
    Hyperparameters,
    TrainingType,
    TrainSpec,
    read_spec,
)

MAX_SEEDS = 20
EVERY_METHOD = "all"
DECIDED = {
    "learning_rate": "the rate is searched for every method; learning_rates says among which",
    "learning_rate_multiplier": "the rate is searched for every method; learning_rates says among which",
    "early_stopping_patience": "all runs of a comparison take the same steps",
    "early_stopping_min_delta": "all runs of a comparison take the same steps",
    "eval_steps": "a comparison evaluates every method after the same steps, about twelve times",
    "samples": "a comparison has no model answer",
}
"""Hyperparameters that are not the caller's here, and why."""


class ComparedMethod(Spec):
    """One of the methods that are compared."""

    adapter: AnyAdapterSpec
    match_budget: bool = Field(
        default=True, description="Choose the rank that meets the budget best, instead of the adapter's own."
    )

    @property
    def is_plain_lora(self) -> bool:
        """LoRA as its paper has it, of whatever rank: what the others are measured by."""
        adapter = self.adapter
        return isinstance(adapter, LoRASpec) and adapter.lora_plus_ratio == 1 and not adapter.rslora

    @property
    def options(self) -> dict[str, Any]:
        """What the caller has chosen beside the method's name."""
        chosen = self.adapter.model_dump(exclude_defaults=True, exclude={"method"})
        return chosen if self.match_budget else {"rank": self.adapter.rank} | chosen


class ComparisonSpec(Spec):
    """One comparison, without its files."""

    model: str = Field(min_length=1, description="Id of the base model.")
    type: TrainingType = "supervised"
    methods: tuple[ComparedMethod, ...] = Field(min_length=1, description="Plain LoRA is one of them.")
    budget: Auto | Annotated[int, Field(ge=1)] = Field(
        default="auto",
        description="Trainable parameters of each method; auto: as many as LoRA, of rank 8 unless given.",
    )
    hyperparameters: Hyperparameters = Field(default_factory=Hyperparameters)
    learning_rates: Auto | tuple[Annotated[float, Field(gt=0, le=MAX_LEARNING_RATE)], ...] = Field(
        default="auto",
        description="Peak rates to try for every method; auto: 0.1, 0.32, 1, 3.2 and 10 times its own.",
    )
    seeds: int = Field(default=3, ge=1, le=MAX_SEEDS, description="Runs of each method at its best rate.")
    seed: int = Field(
        default=0,
        ge=0,
        le=MAX_SEED,
        description="The first one, which the search has too; the others follow.",
    )
    search_share: float = Field(
        default=0.1, gt=0, le=0.5, description="Of the training rows, held out to judge the rates by."
    )

    @property
    def labels(self) -> tuple[str, ...]:
        """A name for each of the methods: its own, with its options where it is there more than once."""
        names = [compared.adapter.method for compared in self.methods]
        return tuple(
            _label(compared) if names.count(name) > 1 else name
            for name, compared in zip(names, self.methods, strict=True)
        )

    @property
    def baseline(self) -> int:
        """Which of the methods is plain LoRA, the first where there are several."""
        return next(i for i, compared in enumerate(self.methods) if compared.is_plain_lora)

    @property
    def training(self) -> TrainSpec:
        """One of the runs, for whoever loads the base model."""
        return TrainSpec(
            model=self.model,
            type=self.type,
            adapter=self.methods[self.baseline].adapter,
            hyperparameters=self.hyperparameters,
            seed=self.seed,
        )


def _label(compared: ComparedMethod) -> str:
    options = ", ".join(f"{name} {value}" for name, value in compared.options.items())
    return f"{compared.adapter.method} ({options})" if options else compared.adapter.method


def read_comparison(
    *,
    model: str,
    methods: Sequence[str | Mapping[str, Any]] | str = EVERY_METHOD,
    type: str = "supervised",
    budget: Any = "auto",
    hyperparameters: Mapping[str, Any] | None = None,
    learning_rates: Any = "auto",
    seeds: Any = 3,
    seed: Any = 0,
    search_share: Any = 0.1,
    prefix: str = "hyperparameters",
) -> ComparisonSpec:
    """Reads loose input into a spec. A method is its name or an adapter object; "all" stands for every one.

    `prefix` is the caller's name for `hyperparameters`, so that an error's `param` fits.

    Raises SpecError, naming the place, what is allowed and the nearest known name.
    """
    shared = _without_what_is_decided(hyperparameters or {}, prefix)
    training = read_spec(model=model, type=type, hyperparameters=shared, seed=seed, prefix=prefix)
    compared = _compared(methods, model, type)
    values = {
        "model": model,
        "type": type,
        "methods": compared,
        "budget": budget,
        "hyperparameters": training.hyperparameters,
        "learning_rates": _rates(learning_rates),
        "seeds": seeds,
        "seed": seed,
        "search_share": search_share,
    }
    spec = read(ComparisonSpec, values, lambda name: "")
    if spec.seed + spec.seeds - 1 > MAX_SEED:
        raise SpecError(f"seed + seeds must stay below {MAX_SEED + 2}.", param="seed")
    return spec


def _without_what_is_decided(given: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The loop's options alone. Raises SpecError for those that the comparison decides itself."""
    options = {name for spec in ADAPTER_SPECS.values() for name in spec.model_fields}
    for name, value in given.items():
        target = HYPERPARAMETER_ALIASES.get(name, name)
        if target in DECIDED and value != Hyperparameters.model_fields[target].default:
            raise SpecError(
                f"{prefix}.{name} cannot be chosen: {DECIDED[target]}. Leave it out.",
                param=f"{prefix}.{name}",
            )
        if ADAPTER_ALIASES.get(name, name) in options:
            raise SpecError(
                f"{prefix}.{name} belongs to a method: give it there, as "
                f'{{"method": "olora", "{ADAPTER_ALIASES.get(name, name)}": …}} among the methods.',
                param=f"{prefix}.{name}",
            )
    return {
        name: value for name, value in given.items() if HYPERPARAMETER_ALIASES.get(name, name) not in DECIDED
    }


def _compared(
    methods: Sequence[str | Mapping[str, Any]] | str, model: str, type: str
) -> tuple[ComparedMethod, ...]:
    """In the caller's order, each once; plain LoRA behind them where it is missing."""
    asked = [methods] if isinstance(methods, str) else methods
    if not isinstance(asked, Sequence) or not asked:
        raise SpecError(
            f'methods must be "{EVERY_METHOD}", or a list of names and adapter objects.', param="methods"
        )
    found: list[ComparedMethod] = []
    for i, method in enumerate(asked):
        place = f"methods[{i}]"
        if method == EVERY_METHOD:
            named = {compared.adapter.method for compared in found}
            found += [_method(name, place, model, type) for name in ADAPTER_SPECS if name not in named]
            continue
        compared = _method(method, place, model, type)
        if compared in found:
            raise SpecError(
                f"{place} is the same as one before it ({_label(compared)}); leave it out, or change it.",
                param=place,
            )
        found.append(compared)
    if not any(compared.is_plain_lora for compared in found):
        targets = {compared.adapter.target_modules for compared in found}
        of = targets.pop() if len(targets) == 1 else "auto"
        found.append(ComparedMethod(adapter=LoRASpec(target_modules=of)))
    return tuple(found)


def _method(method: Any, place: str, model: str, type: str) -> ComparedMethod:
    """Raises SpecError, naming the place."""
    values = {"method": method} if isinstance(method, str) else method
    if not isinstance(values, Mapping) or "method" not in values:
        raise SpecError(
            f"{place} must be a method's name, or an adapter object that has one as its method.", param=place
        )
    name = values["method"]
    if not isinstance(name, str) or name not in ADAPTER_SPECS:
        raise SpecError(
            f"{place}: there is no method {name!r}{nearest(str(name), ADAPTER_SPECS)}. "
            f"Available: {', '.join(ADAPTER_SPECS)}.",
            param=place,
        )
    if values.get("export_rank") is not None:
        raise SpecError(
            f"{place}.export_rank: a comparison exports no adapter; leave it out.",
            param=f"{place}.export_rank",
        )
    try:
        adapter = read_spec(model=model, type=type, adapter=values).adapter
    except SpecError as error:
        inner = (error.param or "").removeprefix("adapter.")
        raise SpecError(f"{place}: {error.message}", param=f"{place}.{inner}") from None
    if adapter.export == "merged" and adapter.has_pair:
        raise SpecError(
            f"{place}.export: a comparison exports no model; leave it out.", param=f"{place}.export"
        )
    gives_rank = any(ADAPTER_ALIASES.get(option, option) == "rank" for option in values)
    return ComparedMethod(adapter=cast(AnyAdapterSpec, adapter), match_budget=not gives_rank)


def _rates(rates: Any) -> Any:
    """Rising. Raises SpecError for what are no rates."""
    if rates == "auto":
        return rates
    numbers = [rates] if isinstance(rates, int | float) else rates
    if (
        not isinstance(numbers, Sequence)
        or isinstance(numbers, str)
        or not numbers
        or not all(
            isinstance(rate, int | float) and not isinstance(rate, bool) and 0 < rate <= MAX_LEARNING_RATE
            for rate in numbers
        )
        or len(set(numbers)) < len(numbers)
    ):
        raise SpecError(
            f'learning_rates must be "auto", or different rates above 0 and up to {MAX_LEARNING_RATE:g}, as '
            f"[0.0001, 0.0003, 0.001]; not {rates!r}.",
            param="learning_rates",
        )
    return tuple(sorted(float(rate) for rate in numbers))
