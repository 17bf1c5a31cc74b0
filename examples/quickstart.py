"""From rows to a loaded adapter, in one run:

    make quickstart

starts the service (API and worker, embedded defaults), uploads training and validation rows, creates an OLoRA
job with the unmodified `openai` client, watches it, downloads the adapter, loads it in PEFT on the untouched
base model, and compares PEFT's logits with the certificate.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cli.progress import TrainingBar
from store.settings import Settings, get_settings
from worker.launch import worker_environment

EXAMPLES = Path(__file__).parent
TRAINING, VALIDATION = EXAMPLES / "docstrings" / "train.jsonl", EXAMPLES / "docstrings" / "valid.jsonl"
BASE = EXAMPLES / "base"
START_SECONDS, STOP_SECONDS = 90, 150
MEASURED, SHOWN = 100, 3
"""Held-out rows whose loss is measured here, and those whose answers are printed."""

console = Console(highlight=False, soft_wrap=True)


def main() -> int:
    settings, started = get_settings(), time.monotonic()
    try:
        with service(settings) as url:
            client = OpenAI(base_url=f"{url}/v1", api_key=key_of(settings))
            job = follow(client, create_job(client, TRAINING, VALIDATION))
            folder = download(client, job, settings.home / "quickstart" / job.id)
        show(folder, job)
        console.print(f"Done in {time.monotonic() - started:.0f} s. Next: make serve")
        return 0
    except KeyboardInterrupt:
        console.print("\n[yellow]Stopped, including the service.[/yellow]")
        return 130
    except QuickstartError as error:
        console.print(f"[red]{error}[/red]", markup=True)
        return 1


class QuickstartError(Exception):
    """Why the run cannot continue, as a sentence."""


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
            cwd=EXAMPLES.parent,
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


def create_job(client: OpenAI, training: Path, validation: Path, **hyperparameters: Any) -> Any:
    """Uploads both files and creates a job. Returns the job."""
    with training.open("rb") as rows, validation.open("rb") as held_out:
        training_file = client.files.create(file=rows, purpose="fine-tune")
        validation_file = client.files.create(file=held_out, purpose="fine-tune")
    console.print(
        f"Uploaded {training.name} as {training_file.id}, {validation.name} as {validation_file.id}"
    )
    job = client.fine_tuning.jobs.create(
        model="olora-tiny",
        training_file=training_file.id,
        validation_file=validation_file.id,
        hyperparameters={"n_epochs": 1, "batch_size": 8} | hyperparameters,
        suffix="quickstart",
        seed=42,
        extra_body={"adapter": {"method": "olora", "rank": 16}},
    )
    console.print(f"Created {job.id}: OLoRA of rank 16 on {job.model}, one epoch")
    return job


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


# The adapter: this part uses only PEFT and transformers


def show(folder: Path, job: Any) -> None:
    """Loads base and adapter, checks the certificate, prints both models' answers. Raises QuickstartError."""
    console.print("Loading the adapter in PEFT, on the untouched base ...")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads sleep instead of spinning
    warnings.filterwarnings("ignore", category=FutureWarning)  # from PEFT about transformers
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    lines = VALIDATION.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[:MEASURED]]
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    trained = trained_logits(base, folder, tokenizer, rows[:8])
    model = PeftModel.from_pretrained(base, folder).eval()

    check(logits(model, tokenizer, rows[:8]), trained, manifest["certificate"])
    after = mean_loss(model, tokenizer, rows)
    with model.disable_adapter():
        before = mean_loss(model, tokenizer, rows)
    shown = [row for row in rows if len(row["messages"][0]["content"]) < 400][:SHOWN]
    tuned = [answer(model, tokenizer, row) for row in shown]
    with model.disable_adapter():
        untuned = [answer(model, tokenizer, row) for row in shown]

    for row, old, new in zip(shown, untuned, tuned, strict=True):
        table = Table(show_header=False, box=None, padding=(0, 1))
        table.add_row("function", Text(row["messages"][0]["content"].partition("\n\n")[2]))
        table.add_row("before", Text(old))
        table.add_row("after", Text(new, style="green"))
        table.add_row("author", Text(row["messages"][1]["content"]))
        console.print(table)
        console.print()
    console.print(f"Loss on {len(rows)} held-out rows: {before:.3f} before, [green]{after:.3f}[/green] after")
    console.print(f"Model    {job.fine_tuned_model}")
    console.print(f"Adapter  {folder}   (PEFT, transformers, vLLM: see its README.md)")
    console.print(f"Metrics  {folder.parent / 'metrics.csv'}")


def trained_logits(base: Any, folder: Path, tokenizer: Any, rows: list[Any]) -> Any:
    """(tokens, vocabulary) logits of `W x + s (B A x - B0 A0 x)`, from the method's own tensors."""
    from safetensors.torch import load_file

    spec = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["spec"]["resolved"]["adapter"]
    tensors = load_file(folder / "native" / "adapter.safetensors", device=str(base.device))
    sites = sorted({name.rpartition(".")[0] for name in tensors})
    scale = spec["alpha"] / spec["rank"]

    def update_hook(site: str) -> Any:
        A, B, A0, B0 = (tensors[f"{site}.{name}"] for name in ("A", "B", "A0", "B0"))

        def hook(layer: Any, inputs: tuple[Any], output: Any) -> Any:
            x = inputs[0]
            return output + scale * (x @ A.T @ B.T - x @ A0.T @ B0.T)

        return hook

    hooks = [base.get_submodule(site).register_forward_hook(update_hook(site)) for site in sites]
    try:
        return logits(base, tokenizer, rows)
    finally:
        for hook in hooks:
            hook.remove()


def logits(model: Any, tokenizer: Any, rows: list[Any]) -> Any:
    """(tokens, vocabulary) logits for the tokens of all rows, concatenated."""
    import torch

    with torch.no_grad():
        return torch.cat([model(encode(tokenizer, row)[0].to(model.device)).logits[0] for row in rows])


def check(served: Any, trained: Any, certificate: dict[str, Any]) -> None:
    """Raises QuickstartError if PEFT's logits differ from the trained ones by more than the bound."""
    difference, _, allowed = compared(served, trained, certificate)
    result = f"{difference:.1e} (allowed {allowed:.1e})"
    if not difference <= allowed:
        raise QuickstartError(f"PEFT's logits are not the trained model's: largest difference {result}.")
    console.print(
        f"[green]Adapter verified[/green] by the service: largest logit difference "
        f"{certificate['max_abs_logit_diff']:.1e}. Checked here in PEFT: {result}"
    )


def compared(served: Any, trained: Any, certificate: dict[str, Any]) -> tuple[float, float, float]:
    """The largest difference of two sets of logits, the largest logit, and the difference that is allowed."""
    difference, largest = float((served - trained).abs().max()), float(trained.abs().max())
    return difference, largest, certificate["bound"] / certificate["max_abs_logit"] * largest


def encode(tokenizer: Any, row: Any) -> tuple[Any, Any]:
    """Token ids and the mask of trained tokens, both (1, tokens)."""
    encoded = tokenizer.apply_chat_template(
        row["messages"], return_assistant_tokens_mask=True, return_dict=True, return_tensors="pt"
    )
    return encoded["input_ids"], encoded["assistant_masks"].bool()


def mean_loss(model: Any, tokenizer: Any, rows: list[Any]) -> float:
    """Mean loss of the answers in nats per token."""
    import torch

    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            ids, trained = encode(tokenizer, row)
            losses = torch.nn.functional.cross_entropy(
                model(ids).logits[0, :-1], ids[0, 1:], reduction="none"
            )
            total += float(losses[trained[0, 1:]].sum())
            count += int(trained[0, 1:].sum())
    return total / count


def answer(model: Any, tokenizer: Any, row: Any) -> str:
    """The model's greedy answer to the row's question."""
    asked = tokenizer.apply_chat_template(
        row["messages"][:1], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    generated = model.generate(**asked, max_new_tokens=32, do_sample=False)[0, asked["input_ids"].shape[1] :]
    return re.sub(r"\s+", " ", tokenizer.decode(generated, skip_special_tokens=True)).strip()


if __name__ == "__main__":
    sys.exit(main())
