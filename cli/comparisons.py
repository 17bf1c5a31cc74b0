"""`olora comparisons`: have the service compare methods, follow it, read what it found."""

import time
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console

from olora_core.progress import ComparedStep, RunFinished
from store.statuses import ENDED

from .client import BaseUrl, ServiceError, connect, raise_for, send
from .compare import read_budget, read_methods, read_rates, show_report
from .jobs import LEVELS, POLL_SECONDS, file_id, new_events, option, print_jobs
from .progress import ComparisonBars

app = typer.Typer(no_args_is_help=True)
console = Console(stderr=True)
ComparisonId = Annotated[str, typer.Argument(help="The comparison's id: cmp-…")]


@app.command()
def create(
    training_file: Annotated[str, typer.Argument(help="A path, or the id of an uploaded file.")],
    validation_file: Annotated[
        str,
        typer.Option("--validation-file", "--validation", help="A path, or a file id; what results are of."),
    ],
    model: Annotated[str, typer.Option(help="Id of the base model.")] = "olora-tiny",
    methods: Annotated[str, typer.Option(help="Names with commas between them, or all.")] = "all",
    training: Annotated[
        str, typer.Option("--type", help="What to learn: supervised (answers) or dpo (preferences).")
    ] = "supervised",
    learning_rates: Annotated[
        str, typer.Option(help="Rates to try for every method, with commas; auto: around each one's own.")
    ] = "auto",
    seeds: Annotated[int, typer.Option(help="Runs of each method at its best rate.")] = 3,
    seed: Annotated[int, typer.Option(help="The first seed.")] = 0,
    budget: Annotated[
        str, typer.Option(help="Trainable parameters of each method; auto: as many as LoRA of rank 8.")
    ] = "auto",
    epochs: Annotated[int | None, typer.Option(help="Passes over the data; default: auto.")] = None,
    options: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", help="Any other hyperparameter, as NAME=VALUE; may be repeated."),
    ] = None,
    follow: Annotated[bool, typer.Option("--watch", help="Follow the comparison until it ends.")] = False,
    base_url: BaseUrl = None,
) -> None:
    """Ask for a comparison; files given as paths are uploaded first. Prints the comparison's id."""
    hyperparameters = dict(option(text) for text in options or [])
    if epochs is not None:
        hyperparameters["n_epochs"] = epochs
    body: dict[str, Any] = {
        "model": model,
        "methods": read_methods(methods),
        "method": {"type": training, training: {"hyperparameters": hyperparameters}},
        "learning_rates": read_rates(learning_rates),
        "seeds": seeds,
        "seed": seed,
        "budget": read_budget(budget),
    }
    with connect(base_url) as client:
        body["training_file"] = file_id(client, training_file)
        body["validation_file"] = file_id(client, validation_file)
        comparison = send(client, "POST", "comparisons", json=body)
        typer.echo(comparison["id"])
        if follow:
            _watch(client, comparison["id"])


@app.command("list")
def list_comparisons(
    limit: Annotated[int, typer.Option(help="How many, newest first.")] = 20, base_url: BaseUrl = None
) -> None:
    """List the newest comparisons."""
    with connect(base_url) as client:
        found = send(client, "GET", "comparisons", params={"limit": limit})["data"]
    print_jobs(found, Console(), "comparison")


@app.command()
def watch(comparison: ComparisonId, base_url: BaseUrl = None) -> None:
    """Follow a comparison until it ends. Exit code 1 when it does not succeed; Ctrl-C leaves it alone."""
    with connect(base_url) as client:
        _watch(client, comparison)


@app.command()
def cancel(comparison: ComparisonId, base_url: BaseUrl = None) -> None:
    """Cancel a comparison; one that runs stops at its next step."""
    with connect(base_url) as client:
        answer = send(client, "POST", f"comparisons/{comparison}/cancel")
    stopping = answer["status"] not in ENDED
    typer.echo(f"{comparison}: {'stopping' if stopping else answer['status']}")


@app.command()
def report(
    comparison: ComparisonId,
    to: Annotated[Path | None, typer.Option(help="The page to write; default: ./COMPARISON.html.")] = None,
    base_url: BaseUrl = None,
) -> None:
    """Fetch a comparison's page, or with --to NAME.json its numbers; prints where it is."""
    path = to or Path(f"{comparison}.html")
    wanted = "json" if path.suffix == ".json" else "html"
    with connect(base_url) as client:
        answer = client.get(f"comparisons/{comparison}/report", params={"format": wanted})
        raise_for(answer)
    try:
        path.write_bytes(answer.content)
    except OSError as error:
        raise ServiceError(
            f"{path} cannot be written: {error.strerror or error}. Name another with --to."
        ) from None
    typer.echo(str(path))


def _watch(client: httpx.Client, comparison_id: str) -> None:
    try:
        comparison = _follow(client, comparison_id)
    except KeyboardInterrupt:
        again = f"olora comparisons watch {comparison_id}"
        console.print(
            f"\nNo longer watching; the comparison goes on. Again: {again}", highlight=False, soft_wrap=True
        )
        raise typer.Exit(130) from None
    if comparison["status"] == "succeeded":
        wanted = {"format": "json"}
        show_report(send(client, "GET", f"comparisons/{comparison_id}/report", params=wanted))
        fetch = f"Its page: olora comparisons report {comparison_id}"
        console.print(fetch, highlight=False, soft_wrap=True)
        return
    if comparison["status"] == "failed":
        reason = (comparison["error"] or {}).get("message", "no reason was given")
        raise ServiceError(f"{comparison_id} failed: {reason}")
    console.print(f"[yellow]{comparison['status']}[/yellow]")
    raise typer.Exit(1)


def _follow(client: httpx.Client, comparison_id: str) -> dict[str, Any]:
    """Shows a comparison's events as they come, until it ends. Returns the comparison."""
    path = f"comparisons/{comparison_id}"
    seen: set[str] = set()
    with ComparisonBars(console) as bars:
        while True:
            comparison: dict[str, Any] = send(client, "GET", path)
            for event in new_events(client, path, seen):
                if event["type"] == "run":
                    bars.finished(RunFinished(**event["data"]))
                else:
                    bars.say(event["message"], LEVELS.get(event["level"], ""))
            if comparison["status"] in ENDED:
                return comparison
            if comparison["status"] == "running" and comparison["progress"]["run"]:
                bars.step(ComparedStep(**comparison["progress"]))
            else:
                bars.phase(comparison["status"].replace("_", " "))
            time.sleep(POLL_SECONDS)
