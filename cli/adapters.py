"""`olora adapters`: download a trained adapter or merged model."""

import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Annotated

import httpx
import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from .client import BaseUrl, ServiceError, connect, raise_for, send

app = typer.Typer(no_args_is_help=True)
console = Console(stderr=True)


@app.callback()
def adapters() -> None:
    """Download trained adapters."""


@app.command()
def download(
    job: Annotated[str, typer.Argument(help="Job id (ftjob-…).")],
    to: Annotated[Path | None, typer.Option(help="Folder to create (default: ./JOB).")] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="A checkpoint (ftckpt_…) of the job, instead of its end.")
    ] = None,
    base_url: BaseUrl = None,
) -> None:
    """Download a job's adapter (or its merged model) into a folder; prints the folder."""
    folder = to or Path(checkpoint or job)
    with _writing(folder):
        taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if taken:
        raise ServiceError(f"{folder} already exists and is not empty; choose another folder with --to.")
    with connect(base_url) as client, tempfile.TemporaryFile() as archive:
        if checkpoint:
            path = f"fine_tuning/jobs/{job}/checkpoints/{checkpoint}/adapter"
            _wait_for_export(client, path)
        else:
            model = send(client, "GET", f"fine_tuning/jobs/{job}")["olora"]["results"].get("model")
            path = f"files/{model}/content" if model else f"fine_tuning/jobs/{job}/adapter"
        _fetch(client, path, archive, folder)
        with _writing(folder), zipfile.ZipFile(archive) as zipped:
            zipped.extractall(folder)
    typer.echo(str(folder))


def _wait_for_export(client: httpx.Client, path: str) -> None:
    """Returns once a worker has made the checkpoint's adapter. Raises ServiceError if that fails."""
    with console.status("a worker is exporting the checkpoint's adapter"):
        while True:
            with client.stream("GET", path) as response:
                if response.status_code != 503:
                    return
                response.read()
                if response.json().get("error", {}).get("code") != "exporting":
                    raise_for(response)
            time.sleep(float(response.headers.get("retry-after", 1)))


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ServiceError(
            f"{folder} cannot be written: {error.strerror or error}. Choose another folder with --to."
        ) from None


def _fetch(client: httpx.Client, path: str, to: IO[bytes], folder: Path) -> None:
    """Downloads `path`. Creates the folder once the response has begun, before the content arrives."""
    bar = Progress(
        TextColumn("downloading"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=console,
        transient=True,
    )
    with bar, client.stream("GET", path) as response:
        raise_for(response)
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        size = int(response.headers.get("content-length", 0)) or None
        task = bar.add_task("", total=size)
        for chunk in response.iter_bytes(1 << 20):
            to.write(chunk)
            bar.advance(task, len(chunk))
    to.seek(0)
