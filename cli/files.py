"""`olora files`: upload training files."""

from pathlib import Path
from typing import Annotated, Any, BinaryIO

import httpx
import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from .client import BaseUrl, ServiceError, connect, send

app = typer.Typer(no_args_is_help=True)
console = Console(stderr=True)


@app.callback()
def files() -> None:
    """Upload training files."""


@app.command()
def upload(
    path: Annotated[Path, typer.Argument(help="File to upload: JSONL, JSON array, CSV or Parquet.")],
    purpose: Annotated[str, typer.Option(help="Purpose of the file.")] = "fine-tune",
    base_url: BaseUrl = None,
) -> None:
    """Upload a file; prints its id."""
    with connect(base_url) as client:
        typer.echo(send_file(client, path, purpose)["id"])


def send_file(client: httpx.Client, path: Path, purpose: str = "fine-tune") -> dict[str, Any]:
    """Uploads with a progress bar. Returns the file object. Raises ServiceError."""
    try:
        stream = path.open("rb")
    except OSError as error:
        raise ServiceError(f"{path} cannot be read: {error.strerror}.") from None
    bar = Progress(
        TextColumn("uploading {task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=console,
        transient=True,
    )
    with stream, bar:
        task = bar.add_task(path.name, total=path.stat().st_size)
        counted: BinaryIO = bar.wrap_file(stream, task_id=task)
        answer: dict[str, Any] = send(
            client, "POST", "files", data={"purpose": purpose}, files={"file": (path.name, counted)}
        )
    report = answer["olora"]["report"] or {}
    detected = f", {report['detected']}" if report.get("detected") else ""
    console.print(
        f"{path.name}: {answer['bytes']:,} bytes, {answer['status']}{detected}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return answer
