"""`olora jobs`: ask for a job, look at the jobs, follow one, cancel one."""

from typing import Annotated, Any

import httpx
import typer
from rich.console import Console

from . import watching
from .client import BaseUrl, connect, send
from .options import Epochs, Hyperparameters, Model, TrainingFile, TrainingType, read_hyperparameters
from .progress import TrainingBar
from .samples import show_samples
from .watching import JOBS, file_id

app = typer.Typer(no_args_is_help=True)
console = Console(stderr=True)
JobId = Annotated[str, typer.Argument(help="The job's id: ftjob-…")]


@app.command()
def create(
    training_file: TrainingFile,
    model: Model = "olora-tiny",
    validation_file: Annotated[str | None, typer.Option(help="A path, or a file id.")] = None,
    method: Annotated[str, typer.Option(help="How to adapt; `olora methods` lists the ways.")] = "olora",
    training: TrainingType = "supervised",
    rank: Annotated[int | None, typer.Option(help="Width of the factors; default: the method's own.")] = None,
    epochs: Epochs = None,
    suffix: Annotated[str | None, typer.Option(help="A word in the model's name.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same adapter.")] = None,
    options: Hyperparameters = None,
    devices: Annotated[int | None, typer.Option(help="GPUs that the job runs on; default: one.")] = None,
    follow: Annotated[bool, typer.Option("--watch", help="Follow the job until it ends.")] = False,
    base_url: BaseUrl = None,
) -> None:
    """Ask for a job; files given as paths are uploaded first. Prints the job's id."""
    hyperparameters = read_hyperparameters(options, n_epochs=epochs)
    body: dict[str, Any] = {
        "model": model,
        "adapter": {"method": method} | ({"rank": rank} if rank is not None else {}),
        "method": {"type": training, training: {"hyperparameters": hyperparameters}},
        "suffix": suffix,
        "seed": seed,
        "olora": {"devices": devices} if devices is not None else None,
    }
    with connect(base_url) as client:
        body["training_file"] = file_id(client, training_file)
        body["validation_file"] = file_id(client, validation_file) if validation_file else None
        job = send(client, "POST", "fine_tuning/jobs", json=body)
        typer.echo(job["id"])
        if follow:
            _watch(client, job["id"])


@app.command("list")
def list_jobs(
    limit: Annotated[int, typer.Option(help="How many, newest first.")] = 20, base_url: BaseUrl = None
) -> None:
    """List the newest jobs."""
    watching.print_newest(JOBS, limit, base_url)


@app.command()
def watch(job: JobId, base_url: BaseUrl = None) -> None:
    """Follow a job until it ends. Exit code 1 when it does not succeed; Ctrl-C leaves the job alone."""
    with connect(base_url) as client:
        _watch(client, job)


@app.command()
def cancel(job: JobId, base_url: BaseUrl = None) -> None:
    """Cancel a job; one that runs stops at its next step."""
    watching.cancel(JOBS, job, base_url)


def _watch(client: httpx.Client, job_id: str) -> None:
    bar = TrainingBar(console)
    job = watching.watch(client, JOBS, job_id, bar)
    bar.print(f"succeeded: {job['fine_tuned_model']}", "green")
    show_samples(console, job["olora"].get("samples"))
    bar.print(f"Fetch it: olora adapters download {job_id}")
