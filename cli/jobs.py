"""`olora jobs`: ask for a job, look at the jobs, follow one, cancel one."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from store.statuses import ENDED

from .client import BaseUrl, ServiceError, connect, send
from .files import send_file
from .progress import TrainingBar
from .samples import show_samples

app = typer.Typer(no_args_is_help=True)
console = Console(stderr=True)
POLL_SECONDS = 1.0
STYLES = {"succeeded": "green", "failed": "red", "cancelled": "yellow", "running": "cyan"}
LEVELS = {"warn": "yellow", "error": "red"}
JobId = Annotated[str, typer.Argument(help="The job's id: ftjob-…")]


@app.command()
def create(
    training_file: Annotated[str, typer.Argument(help="A path, or the id of an uploaded file.")],
    model: Annotated[str, typer.Option(help="Id of the base model.")] = "olora-tiny",
    validation_file: Annotated[str | None, typer.Option(help="A path, or a file id.")] = None,
    method: Annotated[str, typer.Option(help="How to adapt; `olora methods` lists the ways.")] = "olora",
    training: Annotated[
        str, typer.Option("--type", help="What to learn: supervised (answers) or dpo (preferences).")
    ] = "supervised",
    rank: Annotated[int | None, typer.Option(help="Width of the factors; default: the method's own.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data; default: auto.")] = None,
    suffix: Annotated[str | None, typer.Option(help="A word in the model's name.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same adapter.")] = None,
    options: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", help="Any other hyperparameter, as NAME=VALUE; may be repeated."),
    ] = None,
    devices: Annotated[int | None, typer.Option(help="GPUs that the job runs on; default: one.")] = None,
    follow: Annotated[bool, typer.Option("--watch", help="Follow the job until it ends.")] = False,
    base_url: BaseUrl = None,
) -> None:
    """Ask for a job; files given as paths are uploaded first. Prints the job's id."""
    hyperparameters = dict(option(text) for text in options or [])
    if epochs is not None:
        hyperparameters["n_epochs"] = epochs
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


def option(text: str) -> tuple[str, Any]:
    """NAME=VALUE, the value as YAML reads it. Raises ServiceError."""
    import yaml

    name, equals, value = text.partition("=")
    if not name or not equals:
        raise ServiceError(f"--set {text!r} is not NAME=VALUE.")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError:
        return name, value


def file_id(client: httpx.Client, name: str) -> str:
    """A path is uploaded; anything else must be an id."""
    if Path(name).is_file():
        return str(send_file(client, Path(name))["id"])
    if name.startswith("file-"):
        return name
    raise ServiceError(f"{name} is neither a file here nor the id of an uploaded file (file-…).")


@app.command("list")
def list_jobs(
    limit: Annotated[int, typer.Option(help="How many, newest first.")] = 20, base_url: BaseUrl = None
) -> None:
    """List the newest jobs."""
    with connect(base_url) as client:
        jobs = send(client, "GET", "fine_tuning/jobs", params={"limit": limit})["data"]
    print_jobs(jobs, Console())


def print_jobs(jobs: list[dict[str, Any]], to: Console, noun: str = "job") -> None:
    """A table that keeps ids whole; on a pipe a line for each job, with tabs, for grep and awk."""
    if not to.is_terminal:
        for job in jobs:
            created = time.strftime("%Y-%m-%dT%H:%M", time.localtime(job["created_at"]))
            cells = [job["id"], job["status"], created, job["model"], _result(job)]
            to.file.write("\t".join(cells) + "\n")
        return
    table = Table(box=None, pad_edge=False)
    table.add_column(noun, no_wrap=True, min_width=max((len(job["id"]) for job in jobs), default=0))
    table.add_column("status", no_wrap=True)
    table.add_column("created", no_wrap=True)
    table.add_column("model", overflow="fold")
    table.add_column("result", overflow="fold")
    for job in jobs:
        created = time.strftime("%Y-%m-%d %H:%M", time.localtime(job["created_at"]))
        status = Text(job["status"], style=STYLES.get(job["status"], ""))
        table.add_row(job["id"], status, created, Text(job["model"]), Text(_result(job)))
    to.print(table, crop=False)


def _result(job: dict[str, Any]) -> str:
    """The model it made or what it found, or why it did not; on one line."""
    made = job.get("fine_tuned_model") or (job.get("verdict") or {}).get("sentence")
    result = made or (job.get("error") or {}).get("message") or ""
    return " ".join(result.split())


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


@app.command()
def watch(job: JobId, base_url: BaseUrl = None) -> None:
    """Follow a job until it ends. Exit code 1 when it does not succeed; Ctrl-C leaves the job alone."""
    with connect(base_url) as client:
        _watch(client, job)


@app.command()
def cancel(job: JobId, base_url: BaseUrl = None) -> None:
    """Cancel a job; one that runs stops at its next step."""
    with connect(base_url) as client:
        answer = send(client, "POST", f"fine_tuning/jobs/{job}/cancel")
    stopping = answer["status"] not in ENDED
    typer.echo(f"{job}: {'stopping' if stopping else answer['status']}")


def _watch(client: httpx.Client, job_id: str) -> None:
    try:
        job = _follow(client, job_id)
    except KeyboardInterrupt:
        again = f"olora jobs watch {job_id}"
        console.print(
            f"\nNo longer watching; the job goes on. Again: {again}", highlight=False, soft_wrap=True
        )
        raise typer.Exit(130) from None
    if job["status"] == "succeeded":
        made = _plain(job["fine_tuned_model"])
        console.print(f"[green]succeeded[/green]: {made}", highlight=False, soft_wrap=True)
        show_samples(console, job["olora"].get("samples"))
        console.print(f"Fetch it: olora adapters download {job_id}", highlight=False, soft_wrap=True)
        return
    if job["status"] == "failed":
        raise ServiceError(f"{job_id} failed: {(job['error'] or {}).get('message', 'no reason was given')}")
    console.print(f"[yellow]{job['status']}[/yellow]")
    raise typer.Exit(1)


def _follow(client: httpx.Client, job_id: str) -> dict[str, Any]:
    """Shows a job's events as they come, until it ends. Returns the job."""
    seen: set[str] = set()
    path = f"fine_tuning/jobs/{job_id}"
    with TrainingBar(console) as bar:
        while True:
            job: dict[str, Any] = send(client, "GET", path)
            for event in new_events(client, path, seen):
                _show(bar, event)
            if job["status"] in ENDED:
                return job
            if job["status"] != "running":
                bar.phase(job["status"].replace("_", " "))
            time.sleep(POLL_SECONDS)


def new_events(client: httpx.Client, path: str, seen: set[str]) -> Iterator[dict[str, Any]]:
    """Events not yet seen of the job at `path`, oldest first. The service lists the newest first, a page at a
    time.
    """
    fresh: list[dict[str, Any]] = []
    after: dict[str, str] = {}
    while True:
        page = send(client, "GET", f"{path}/events", params={"limit": 100} | after)
        unseen = [event for event in page["data"] if event["id"] not in seen]
        fresh += unseen
        if not page["has_more"] or len(unseen) < len(page["data"]):
            break
        after = {"after": page["data"][-1]["id"]}
    seen.update(event["id"] for event in fresh)
    yield from reversed(fresh)


def _show(bar: TrainingBar, event: dict[str, Any]) -> None:
    data = event.get("data") or {}
    if event["type"] == "metrics" and "step" in data:
        bar.metrics(data)
    else:
        bar.say(event["message"], LEVELS.get(event["level"], ""))
