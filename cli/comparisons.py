"""`olora comparisons`: compare methods in the service, watch it, download the report."""

from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console

from . import watching
from .client import BaseUrl, ServiceError, connect, raise_for, send
from .compare import show_report
from .options import (
    VALIDATION_HELP,
    Budget,
    Columns,
    Epochs,
    FirstSeed,
    GroupBy,
    Hyperparameters,
    LearningRates,
    Methods,
    Model,
    Seeds,
    TrainingFile,
    TrainingType,
    ValidationShare,
    olora_object,
    read_budget,
    read_columns,
    read_hyperparameters,
    read_methods,
    read_rates,
)
from .progress import ComparisonBars
from .watching import COMPARISONS, file_id

app = typer.Typer(no_args_is_help=True)
console = Console(stderr=True)
ComparisonId = Annotated[str, typer.Argument(help="Comparison id (cmp-…).")]


@app.command()
def create(
    training_file: TrainingFile,
    validation_file: Annotated[
        str | None,
        typer.Option("--validation-file", "--validation", help=f"{VALIDATION_HELP} A path, or a file id."),
    ] = None,
    validation_share: ValidationShare = None,
    group_by: GroupBy = None,
    model: Model = "olora-tiny",
    methods: Methods = "all",
    training: TrainingType = "supervised",
    learning_rates: LearningRates = "auto",
    seeds: Seeds = 3,
    seed: FirstSeed = 0,
    budget: Budget = "auto",
    epochs: Epochs = None,
    options: Hyperparameters = None,
    columns: Columns = None,
    follow: Annotated[bool, typer.Option("--watch", help="Watch the comparison until it ends.")] = False,
    base_url: BaseUrl = None,
) -> None:
    """Create a comparison; files given as paths are uploaded first. Prints the comparison's id."""
    hyperparameters = read_hyperparameters(options, n_epochs=epochs)
    body: dict[str, Any] = {
        "model": model,
        "methods": read_methods(methods),
        "method": {"type": training, training: {"hyperparameters": hyperparameters}},
        "learning_rates": read_rates(learning_rates),
        "seeds": seeds,
        "seed": seed,
        "budget": read_budget(budget),
        "olora": olora_object(
            validation_share=validation_share, group_by=group_by, columns=read_columns(columns)
        ),
    }
    with connect(base_url) as client:
        body["training_file"] = file_id(client, training_file)
        body["validation_file"] = file_id(client, validation_file) if validation_file else None
        comparison = send(client, "POST", "comparisons", json=body)
        typer.echo(comparison["id"])
        if follow:
            _watch(client, comparison["id"])


@app.command("list")
def list_comparisons(
    limit: Annotated[int, typer.Option(help="Number of comparisons, newest first.")] = 20,
    base_url: BaseUrl = None,
) -> None:
    """List the newest comparisons."""
    watching.print_newest(COMPARISONS, limit, base_url)


@app.command()
def watch(comparison: ComparisonId, base_url: BaseUrl = None) -> None:
    """Watch a comparison until it ends; exit code 1 unless it succeeds. Ctrl-C does not stop it."""
    with connect(base_url) as client:
        _watch(client, comparison)


@app.command()
def cancel(comparison: ComparisonId, base_url: BaseUrl = None) -> None:
    """Cancel a comparison."""
    watching.ask(COMPARISONS, comparison, "cancel", base_url)


@app.command()
def pause(comparison: ComparisonId, base_url: BaseUrl = None) -> None:
    """Pause a comparison; a running one saves a checkpoint and releases its device."""
    watching.ask(COMPARISONS, comparison, "pause", base_url)


@app.command()
def resume(comparison: ComparisonId, base_url: BaseUrl = None) -> None:
    """Resume a paused comparison where it stopped."""
    watching.ask(COMPARISONS, comparison, "resume", base_url)


@app.command()
def report(
    comparison: ComparisonId,
    to: Annotated[Path | None, typer.Option(help="File to write (default: ./COMPARISON.html).")] = None,
    base_url: BaseUrl = None,
) -> None:
    """Download a comparison's page, or with --to NAME.json its numbers; prints the path."""
    path = to or Path(f"{comparison}.html")
    format = "json" if path.suffix == ".json" else "html"
    with connect(base_url) as client:
        answer = client.get(f"comparisons/{comparison}/report", params={"format": format})
        raise_for(answer)
    try:
        path.write_bytes(answer.content)
    except OSError as error:
        raise ServiceError(
            f"{path} cannot be written: {error.strerror or error}. Choose another file with --to."
        ) from None
    typer.echo(str(path))


def _watch(client: httpx.Client, comparison_id: str) -> None:
    bars = ComparisonBars(console)
    watching.watch(client, COMPARISONS, comparison_id, bars)
    show_report(send(client, "GET", f"comparisons/{comparison_id}/report", params={"format": "json"}))
    bars.print(f"Download the report: olora comparisons report {comparison_id}")
