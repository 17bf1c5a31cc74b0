"""What the quickstarts share: a running service, a job by OpenAI's client, and the files that it leaves."""

import os
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI
from rich.console import Console

from cli.progress import TrainingBar
from store.settings import Settings
from worker.launch import worker_environment

ROOT = Path(__file__).parents[1]
START_SECONDS, STOP_SECONDS = 90, 150

console = Console(highlight=False, soft_wrap=True)


class QuickstartError(Exception):
    """Why the run cannot continue, as a sentence."""


def exit_code(run: Callable[[], None]) -> int:
    """Calls `run`: 0, or 130 after Ctrl-C, or 1 after a QuickstartError, whose sentence is printed."""
    started = time.monotonic()
    try:
        run()
        console.print(f"Done in {time.monotonic() - started:.0f} s. Next: make serve")
        return 0
    except KeyboardInterrupt:
        console.print("\n[yellow]Stopped, including the service.[/yellow]")
        return 130
    except QuickstartError as error:
        console.print(f"[red]{error}[/red]", markup=True)
        return 1


# The service


@contextmanager
def service(
    settings: Settings, start_seconds: float = START_SECONDS, stop_seconds: float = STOP_SECONDS
) -> Iterator[str]:
    """`olora serve` on a free port until the block ends; yields its address."""
    port = settings.port or free_port(settings.host)
    if not is_free(settings.host, port):
        port = free_port(settings.host)
        console.print(f"Port {settings.port} is taken; using {port}.")
    log = settings.home / "logs" / "quickstart.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    console.print(f"Starting the API and a worker (logs: {log.parent}) ...")
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "cli.main", "serve", "--port", str(port)],
            cwd=ROOT,
            # The service ends with this process, even if it is killed.
            env=worker_environment(os.environ, parent=os.getpid()),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C reaches only this process, which then stops the service
        )
    try:
        url = f"http://{settings.host}:{port}"
        wait_until_up(url, process, log, start_seconds)
        yield url
    finally:
        stop(process, stop_seconds)


def is_free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def wait_until_up(url: str, process: "subprocess.Popen[bytes]", log: Path, seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if process.poll() is not None:
            raise QuickstartError(f"The service did not start:\n{log.read_text(errors='replace')[-2000:]}")
        with suppress(httpx.TransportError):
            if httpx.get(f"{url}/readyz", timeout=5).is_success:
                return
        time.sleep(0.2)
    raise QuickstartError(f"The service did not answer within {seconds:g} s; see {log}.")


def stop(process: "subprocess.Popen[bytes]", seconds: float) -> None:
    """SIGTERM, then SIGKILL if that takes longer than `seconds`."""
    if process.poll() is not None:
        return
    console.print("Stopping the API and the worker ...")
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(seconds)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.kill()
        process.wait()


def key_of(settings: Settings) -> str:
    if settings.api_key:
        return settings.api_key.get_secret_value()
    return settings.key_file.read_text(encoding="utf-8").strip()


# The job: this part uses only OpenAI's API


def create_job(client: OpenAI, training: Path, validation: Path, **request: Any) -> Any:
    """Uploads both files and creates a job; `request` is what else `fine_tuning.jobs.create` takes."""
    with training.open("rb") as rows, validation.open("rb") as held_out:
        training_file = client.files.create(file=rows, purpose="fine-tune")
        validation_file = client.files.create(file=held_out, purpose="fine-tune")
    console.print(
        f"Uploaded {training.name} as {training_file.id}, {validation.name} as {validation_file.id}"
    )
    return client.fine_tuning.jobs.create(
        training_file=training_file.id, validation_file=validation_file.id, **request
    )


def follow(client: OpenAI, job: Any) -> Any:
    """Shows the job's events until it ends. Returns the succeeded job."""
    seen: set[str] = set()
    with TrainingBar(console) as bar:
        while True:
            job = client.fine_tuning.jobs.retrieve(job.id)
            for event in new_events(client, job.id, seen):
                if event.type == "metrics":
                    bar.metrics(event.data)
                else:
                    bar.print(event.message, "yellow" if event.level == "warn" else "dim")
            if job.status not in ("validating_files", "queued", "running"):
                break
            time.sleep(0.5)
    if job.status != "succeeded":
        raise QuickstartError(
            f"The job {job.status}: {job.error.message if job.error else 'no reason given'}"
        )
    return job


def new_events(client: OpenAI, job_id: str, seen: set[str]) -> list[Any]:
    """Events not yet in `seen`, oldest first; the service lists the newest first."""
    fresh = []
    for event in client.fine_tuning.jobs.list_events(job_id, limit=100):
        if event.id in seen:
            break
        fresh.append(event)
    seen.update(event.id for event in fresh)
    return fresh[::-1]


def download(client: OpenAI, job: Any, to: Path) -> Path:
    """The adapter's folder. `result_files` holds the metrics first, then the adapter."""
    to.mkdir(parents=True, exist_ok=True)
    metrics, adapter = job.result_files[:2]
    client.files.content(metrics).write_to_file(to / "metrics.csv")
    client.files.content(adapter).write_to_file(to / "adapter.zip")
    with zipfile.ZipFile(to / "adapter.zip") as archive:
        archive.extractall(to / "adapter")
    return to / "adapter"


def show_results(job: Any, folder: Path) -> None:
    """Prints where the job's results are."""
    console.print(f"Model    {job.fine_tuned_model}")
    console.print(f"Adapter  {folder}   (PEFT, transformers, vLLM: see its README.md)")
    console.print(f"Metrics  {folder.parent / 'metrics.csv'}")
