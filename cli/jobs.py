"""`olora jobs`: create, list, watch and cancel fine-tuning jobs."""

from typing import Annotated, Any

import httpx
import typer
from rich.console import Console

from . import watching
from .client import BaseUrl, connect, send
from .options import (
    Columns,
    Epochs,
    GroupBy,
    Hyperparameters,
    Model,
    TrainingFile,
    TrainingType,
    ValidationShare,
    olora_object,
    read_columns,
    read_hyperparameters,
)
from .progress import TrainingBar
from .samples import show_samples
from .watching import JOBS, file_id

app = typer.Typer(no_args_is_help=True)
console = Console(stderr=True)
JobId = Annotated[str, typer.Argument(help="Job id (ftjob-…).")]


@app.command()
def create(
    training_file: TrainingFile,
    model: Model = "olora-tiny",
    validation_file: Annotated[
        str | None, typer.Option(help="Validation file: a path, or a file id.")
    ] = None,
    validation_share: ValidationShare = None,
    group_by: GroupBy = None,
    method: Annotated[str, typer.Option(help="Fine-tuning method; see `olora methods`.")] = "olora",
    training: TrainingType = "supervised",
    rank: Annotated[int | None, typer.Option(help="LoRA rank (default: depends on the method).")] = None,
    epochs: Epochs = None,
    suffix: Annotated[str | None, typer.Option(help="Suffix for the fine-tuned model's name.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Random seed; the same seed gives the same adapter.")
    ] = None,
    options: Hyperparameters = None,
    columns: Columns = None,
    devices: Annotated[int | None, typer.Option(help="Number of GPUs to train on (default: 1).")] = None,
    follow: Annotated[bool, typer.Option("--watch", help="Watch the job until it ends.")] = False,
    base_url: BaseUrl = None,
) -> None:
    """Create a job; files given as paths are uploaded first. Prints the job's id."""
    hyperparameters = read_hyperparameters(options, n_epochs=epochs)
    body: dict[str, Any] = {
        "model": model,
        "adapter": {"method": method} | ({"rank": rank} if rank is not None else {}),
        "method": {"type": training, training: {"hyperparameters": hyperparameters}},
        "suffix": suffix,
        "seed": seed,
        "olora": olora_object(
            devices=devices,
            validation_share=validation_share,
            group_by=group_by,
            columns=read_columns(columns),
        ),
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
    limit: Annotated[int, typer.Option(help="Number of jobs, newest first.")] = 20, base_url: BaseUrl = None
) -> None:
    """List the newest jobs."""
    watching.print_newest(JOBS, limit, base_url)


@app.command()
def watch(job: JobId, base_url: BaseUrl = None) -> None:
    """Watch a job until it ends; exit code 1 unless it succeeds. Ctrl-C does not stop the job."""
    with connect(base_url) as client:
        _watch(client, job)


@app.command()
def cancel(job: JobId, base_url: BaseUrl = None) -> None:
    """Cancel a job."""
    watching.ask(JOBS, job, "cancel", base_url)


@app.command()
def pause(job: JobId, base_url: BaseUrl = None) -> None:
    """Pause a job; a running one saves a checkpoint and releases its device."""
    watching.ask(JOBS, job, "pause", base_url)


@app.command()
def resume(job: JobId, base_url: BaseUrl = None) -> None:
    """Resume a paused job where it stopped."""
    watching.ask(JOBS, job, "resume", base_url)


def _watch(client: httpx.Client, job_id: str) -> None:
    bar = TrainingBar(console)
    job = watching.watch(client, JOBS, job_id, bar)
    bar.print(f"succeeded: {job['fine_tuned_model']}", "green")
    show_samples(console, job["olora"].get("samples"))
    bar.print(f"Download it: olora adapters download {job_id}")
