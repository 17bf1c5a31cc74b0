"""The spec of a comparison of several methods on the same data, and how untyped input is read into it."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from ..errors import SpecError
from .adapters import ADAPTER_SPECS
from .base import Auto, Spec, read
from .compared_methods import EVERY_METHOD, ComparedMethod, label_of, read_methods
from .hyperparameters import Hyperparameters
from .methods.base import MAX_LEARNING_RATE
from .training import (
    ADAPTER_ALIASES,
    HYPERPARAMETER_ALIASES,
    MAX_SEED,
    Columns,
    GroupBy,
    Share,
    TrainingType,
    TrainSpec,
    check_validation,
    read_spec,
)

MAX_SEEDS = 20
DECIDED = {
    "learning_rate": "a comparison searches each method's rate among learning_rates",
    "learning_rate_multiplier": "a comparison searches each method's rate among learning_rates",
    "early_stopping_patience": "all runs of a comparison take the same number of steps",
    "early_stopping_min_delta": "all runs of a comparison take the same number of steps",
    "eval_steps": "a comparison evaluates every method after the same steps, about twelve times",
    "samples": "a comparison generates no sample answers",
}
"""Hyperparameters that a comparison decides itself, and why."""


class ComparisonSpec(Spec):
    """A comparison, without its files."""

    model: str = Field(min_length=1, description="Id of the base model.")
    type: TrainingType = "supervised"
    methods: tuple[ComparedMethod, ...] = Field(
        min_length=1, description="The methods to compare, plain LoRA among them."
    )
    budget: Auto | Annotated[int, Field(ge=1)] = Field(
        default="auto",
        description="Trainable parameters of each method; auto: those of LoRA, at rank 8 unless given.",
    )
    hyperparameters: Hyperparameters = Field(default_factory=Hyperparameters)
    learning_rates: Auto | tuple[Annotated[float, Field(gt=0, le=MAX_LEARNING_RATE)], ...] = Field(
        default="auto",
        description="Peak rates to try for every method; auto: 0.1, 0.32, 1, 3.2 and 10 times its default.",
    )
    seeds: int = Field(default=3, ge=1, le=MAX_SEEDS, description="Runs of each method at its best rate.")
    seed: int = Field(
        default=0,
        ge=0,
        le=MAX_SEED,
        description="First random seed, also used by the search; the others count up from it.",
    )
    search_share: float = Field(
        default=0.1,
        gt=0,
        le=0.5,
        description="Share of the training rows that is held out to choose the learning rates.",
    )
    validation_share: Share | None = Field(
        default=None,
        description="Share of the training rows to hold out for the final results, instead of a validation "
        "file.",
    )
    group_by: GroupBy = None
    columns: Columns = None

    @property
    def labels(self) -> tuple[str, ...]:
        """A label for each method: its name, with its options if the name occurs more than once."""
        names = [compared.adapter.method for compared in self.methods]
        return tuple(
            label_of(compared) if names.count(name) > 1 else name
            for name, compared in zip(names, self.methods, strict=True)
        )

    @property
    def baseline(self) -> int:
        """The index of plain LoRA among the methods, the first if there are several."""
        return next(i for i, compared in enumerate(self.methods) if compared.is_plain_lora)

    @property
    def training(self) -> TrainSpec:
        """The spec of one of the runs, from which the base model can be loaded."""
        return TrainSpec(
            model=self.model,
            type=self.type,
            adapter=self.methods[self.baseline].adapter,
            hyperparameters=self.hyperparameters,
            seed=self.seed,
            validation_share=self.validation_share,
            group_by=self.group_by,
            columns=self.columns,
        )


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
    validation_share: Any = None,
    group_by: Any = None,
    columns: Mapping[str, str] | None = None,
    prefix: str = "hyperparameters",
) -> ComparisonSpec:
    """Reads untyped input into a spec. A method is a name or an adapter object; "all" is every method.

    `prefix` is the request's name for `hyperparameters`, for the `param` of errors.

    Raises SpecError with the field, the values it takes and the nearest known name.
    """
    shared = _without_what_is_decided(hyperparameters or {}, prefix)
    training = read_spec(model=model, type=type, hyperparameters=shared, seed=seed, prefix=prefix)
    compared = read_methods(methods, model, type)
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
        "validation_share": validation_share,
        "group_by": group_by,
        "columns": columns or None,
    }
    spec = read(ComparisonSpec, values, lambda name: "")
    if spec.seed + spec.seeds - 1 > MAX_SEED:
        raise SpecError(
            f"seed + seeds must be less than {MAX_SEED + 2} (got {spec.seed + spec.seeds}).", param="seed"
        )
    return spec


def check_judging(spec: ComparisonSpec, *, given: bool, place: str = "") -> None:
    """Raises SpecError unless there is either a validation file, `given`, or the spec's `validation_share`.

    `place` (such as "olora.") is the request's name for where that option is.
    """
    check_validation(spec.training, given=given, place=place)
    if not given and spec.validation_share is None:
        raise SpecError(
            "validation_file is missing: the final results need held-out rows, on which no run has trained "
            f"and no learning rate was chosen. Pass a file of such rows, or {place}validation_share to hold "
            "out some of the training rows.",
            param="validation_file",
        )


def _without_what_is_decided(given: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The training options that the caller may choose. Raises SpecError for the others."""
    options = {name for spec in ADAPTER_SPECS.values() for name in spec.model_fields}
    for name, value in given.items():
        target = HYPERPARAMETER_ALIASES.get(name, name)
        if target in DECIDED and value != Hyperparameters.model_fields[target].default:
            raise SpecError(
                f"{prefix}.{name} must be left out: {DECIDED[target]}.",
                param=f"{prefix}.{name}",
            )
        if ADAPTER_ALIASES.get(name, name) in options:
            raise SpecError(
                f"{prefix}.{name} is an option of a method: pass it there, such as "
                f'{{"method": "olora", "{ADAPTER_ALIASES.get(name, name)}": …}} among the methods.',
                param=f"{prefix}.{name}",
            )
    return {
        name: value for name, value in given.items() if HYPERPARAMETER_ALIASES.get(name, name) not in DECIDED
    }


def _rates(rates: Any) -> Any:
    """The rates in rising order. Raises SpecError for anything else."""
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
            f"learning_rates must be 'auto' or different numbers above 0 and at most {MAX_LEARNING_RATE:g}, "
            f"such as [0.0001, 0.0003, 0.001] (got {rates!r}).",
            param="learning_rates",
        )
    return tuple(sorted(float(rate) for rate in numbers))
