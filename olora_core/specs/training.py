"""The spec of one training run, and how untyped input is read into it."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from ..errors import SpecError
from .adapters import ADAPTER_SPECS, DEFAULT_METHOD, AnyAdapterSpec, check_export
from .base import Spec, nearest, read
from .hyperparameters import Hyperparameters
from .methods.olora import OLoRASpec

MAX_SEED = 2**31 - 1
TrainingType = Literal["supervised", "dpo"]
Name = Annotated[str, Field(min_length=1, max_length=256)]
Share = Annotated[float, Field(gt=0, lt=1)]
ValidationShare = Annotated[
    Share | None,
    Field(description="Share of the training rows to hold out for validation, instead of a validation file."),
]
GroupBy = Annotated[
    Name | None,
    Field(
        description="A key at the top level of the rows: those with the same value are all held out or none."
    ),
]
Columns = Annotated[
    Annotated[dict[Name, Name], Field(min_length=1, max_length=32)] | None,
    Field(
        description='The files\' columns by the keys they stand for: {"prompt": "question"}; null: as named.'
    ),
]


class TrainSpec(Spec):
    """A training run, without its files."""

    model: str = Field(min_length=1, description="Id of the base model.")
    type: TrainingType = Field(
        default="supervised",
        description="Learn answers, or which of two answers to prefer (DPO, arXiv 2305.18290).",
    )
    adapter: AnyAdapterSpec = Field(default_factory=OLoRASpec)
    hyperparameters: Hyperparameters = Field(default_factory=Hyperparameters)
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    validation_share: ValidationShare = None
    group_by: GroupBy = None
    columns: Columns = None


def check_validation(
    spec: TrainSpec, *, given: bool, prefix: str = "hyperparameters", place: str = ""
) -> None:
    """Raises SpecError for options that contradict a validation file that is `given`, or need one.

    `prefix` and `place` (such as "olora.") are the request's names for where the options are.
    """
    share = f"{place}validation_share"
    if spec.validation_share is not None and given:
        raise SpecError(
            f"{share} and a validation_file exclude each other; pass only one.",
            param=share,
        )
    if spec.group_by is not None and spec.validation_share is None:
        raise SpecError(
            f"{place}group_by says which rows {share} keeps together, and there is none; pass that too, or "
            "leave this out.",
            param=f"{place}group_by",
        )
    for name in ("early_stopping_patience", "eval_steps"):
        asked = getattr(spec.hyperparameters, name) is not None
        if asked and not given and spec.validation_share is None:
            raise SpecError(
                f"{prefix}.{name} needs the validation loss, and there is no validation_file and no {share}; "
                "pass one, or leave the option out.",
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
    validation_share: float | None = None,
    group_by: str | None = None,
    columns: Mapping[str, str] | None = None,
    prefix: str = "hyperparameters",
) -> TrainSpec:
    """Reads untyped input into a spec.

    `hyperparameters` can also have the adapter's options (`rank`, `lora_r`, …), as clients of hosted services
    send them. `prefix` is the request's name for that object, for the `param` of errors.

    Raises SpecError with the field, the values it takes and the nearest known name.
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
    chosen = _read_hyperparameters(type, training_values, prefix)
    method = adapter_values.setdefault("method", DEFAULT_METHOD)
    if not isinstance(method, str) or method not in ADAPTER_SPECS:
        raise SpecError(
            f"adapter.method {method!r} is unknown{nearest(str(method), ADAPTER_SPECS)}. "
            f"Available: {', '.join(ADAPTER_SPECS)}.",
            param="adapter.method",
        )
    read_adapter = read(ADAPTER_SPECS[method], adapter_values, lambda name: places.get(name, "adapter"))
    check_export(read_adapter)
    values = {
        "model": model,
        "type": type,
        "adapter": read_adapter,
        "hyperparameters": chosen,
        "seed": _read_seed(seed),
        "validation_share": validation_share,
        "group_by": group_by,
        "columns": columns or None,
    }
    return read(TrainSpec, values, lambda name: "")


def _read_hyperparameters(type: str, values: dict[str, Any], prefix: str) -> Hyperparameters:
    """The training options, checked against each other and against the type of training."""
    multiplier = values.get("learning_rate_multiplier", "auto")
    if multiplier != "auto" and values.get("learning_rate", "auto") not in ("auto", "table"):
        raise SpecError(
            "learning_rate and learning_rate_multiplier exclude each other; pass only one.",
            param=f"{prefix}.learning_rate",
        )
    if type == "dpo" and values.get("beta") is None:
        values["beta"] = "auto"
    if type != "dpo" and values.get("beta") is not None:
        raise SpecError(
            f"{prefix}.beta is for method.type 'dpo', and this is '{type}'; leave it out, or use dpo.",
            param=f"{prefix}.beta",
        )
    chosen = read(Hyperparameters, values, lambda name: prefix)
    if type == "dpo" and chosen.neftune_alpha:
        raise SpecError(
            f"{prefix}.neftune_alpha is for method.type 'supervised': dpo compares the model with the base, "
            "and noise on one side would distort the comparison. Leave it out, or set it to 0.",
            param=f"{prefix}.neftune_alpha",
        )
    if chosen.early_stopping_min_delta and chosen.early_stopping_patience is None:
        raise SpecError(
            f"{prefix}.early_stopping_min_delta needs early_stopping_patience, the number of evaluations "
            "after which to stop; pass that too, or leave this out.",
            param=f"{prefix}.early_stopping_min_delta",
        )
    return chosen


def _route_hyperparameter(
    name: str,
    value: Any,
    training_values: dict[str, Any],
    adapter_values: dict[str, Any],
    places: dict[str, str],
    prefix: str,
) -> None:
    """Puts one hyperparameter with the training options, or with the adapter's."""
    if name == "lora":
        if value is not True:
            raise SpecError(
                f"{prefix}.lora: full fine-tuning is not available, an adapter is always trained; "
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
    """Adds a value. Raises SpecError when the option has another value already, from another place."""
    if key in values and values[key] != value:
        raise SpecError(
            f"{place} = {value!r} contradicts {key} = {values[key]!r} given elsewhere; pass it once.",
            param=place,
        )
    values[key] = value


def known_hyperparameters() -> list[str]:
    """Every name that a hyperparameters object can have, with aliases."""
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
        raise SpecError(f"seed must be a whole number from 0 to {MAX_SEED} (got {seed!r}).", param="seed")
    return seed
