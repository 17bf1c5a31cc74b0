"""Options that several commands take, and how their text is read."""

from typing import Annotated, Any

import typer

from olora_core.errors import SpecError

TrainingFile = Annotated[
    str, typer.Argument(help="Training file: a path, or the id of a file uploaded before.")
]
Model = Annotated[str, typer.Option(help="Base model id.")]
TrainingType = Annotated[str, typer.Option("--type", help="supervised, or dpo for preference pairs.")]
Epochs = Annotated[int | None, typer.Option(help="Passes over the training data (default: auto).")]
Hyperparameters = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="NAME=VALUE", help="Another hyperparameter; may be repeated."),
]
Methods = Annotated[
    str,
    typer.Option(
        help="Method names separated by commas, or all; with options: {method: olora, rank: 16}. "
        "LoRA is always included."
    ),
]
LearningRates = Annotated[
    str,
    typer.Option(help="Rates to try for every method, separated by commas (auto: around its default)."),
]
Seeds = Annotated[int, typer.Option(help="Runs of each method at its best learning rate.")]
FirstSeed = Annotated[int, typer.Option(help="First random seed.")]
Budget = Annotated[str, typer.Option(help="Trainable parameters per method (auto: those of LoRA at rank 8).")]
ValidationShare = Annotated[
    float | None,
    typer.Option(help="Share of the training rows to hold out for validation, instead of a validation file."),
]
GroupBy = Annotated[
    str | None,
    typer.Option(
        metavar="KEY", help="With --validation-share: rows with the same value of this key stay together."
    ),
]
Columns = Annotated[
    str | None,
    typer.Option(
        metavar="KEY=COLUMN,…",
        help="Columns of the files by the keys they stand for: prompt=question,completion=answer.",
    ),
]
VALIDATION_HELP = "Held-out data used only for the final results, never for tuning."


def read_hyperparameters(options: list[str] | None, **given: Any) -> dict[str, Any]:
    """The NAME=VALUE options, overridden by those in `given` that are not None. Raises SpecError."""
    chosen = {name: value for name, value in given.items() if value is not None}
    return dict(map(_name_and_value, options or [])) | chosen


def olora_object(**options: Any) -> dict[str, Any] | None:
    """A request's `olora` object, of the options that are not None; None without any."""
    return {name: value for name, value in options.items() if value is not None} or None


def read_columns(text: str | None) -> dict[str, str] | None:
    """The KEY=COLUMN pairs, checked. Raises SpecError."""
    from olora_core.formats import check_columns

    if text is None:
        return None
    columns: dict[str, str] = {}
    for part in text.split(","):
        key, equals, column = (side.strip() for side in part.partition("="))
        if not key or not equals:
            raise SpecError(f"--columns {part.strip()!r} is not KEY=COLUMN.", param="columns")
        if key in columns:
            raise SpecError(f"--columns gives '{key}' twice; give it once.", param="columns")
        columns[key] = column
    check_columns(columns, "--columns")
    return columns


def _name_and_value(text: str) -> tuple[str, Any]:
    import yaml

    name, equals, value = text.partition("=")
    if not name or not equals:
        raise SpecError(f"--set {text!r} is not NAME=VALUE.", param="set")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError:
        return name, value


def read_methods(text: str) -> list[Any]:
    import yaml

    try:
        found = yaml.safe_load(f"[{text}]")
    except yaml.YAMLError:
        found = None
    if not found:
        raise SpecError(
            f"--methods {text!r} is not a list such as 'olora, lora' or 'lora, {{method: olora, rank: 16}}'.",
            param="methods",
        )
    return list(found)


def read_rates(text: str) -> Any:
    return text if text == "auto" else [_number(part, "learning-rates") for part in text.split(",")]


def read_budget(text: str) -> Any:
    return text if text == "auto" else _number(text, "budget")


def _number(text: str, name: str) -> float | int:
    try:
        return int(text) if text.strip().isdigit() else float(text)
    except ValueError:
        raise SpecError(
            f"--{name}: {text.strip()!r} is not a number; give numbers or auto.", param=name
        ) from None
