"""From rows to a loaded adapter, in one run:

    make quickstart

starts the service (API and worker, embedded defaults), uploads training and validation rows, creates an OLoRA
job with the unmodified `openai` client, watches it, downloads the adapter, loads it in PEFT on the untouched
base model, and compares PEFT's logits with the certificate. `quickstart_real.py` does so on a real model.
"""

import json
import sys
from pathlib import Path
from typing import Any

from openai import OpenAI
from rich.table import Table
from rich.text import Text

from store.settings import get_settings

from . import peft_adapter, service
from .service import console

EXAMPLES = Path(__file__).parent
TRAINING, VALIDATION = EXAMPLES / "docstrings" / "train.jsonl", EXAMPLES / "docstrings" / "valid.jsonl"
BASE = EXAMPLES / "base"
MEASURED, SHOWN = 100, 3
"""Held-out rows whose loss is measured here, and those whose answers are printed."""
LONGEST = 32
"""Tokens of a printed answer."""


def main() -> int:
    return service.exit_code(run)


def run() -> None:
    settings = get_settings()
    with service.service(settings) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key=service.key_of(settings))
        job = service.follow(client, create_job(client, TRAINING, VALIDATION))
        folder = service.download(client, job, settings.home / "quickstart" / job.id)
    show(folder, job)


def create_job(client: OpenAI, training: Path, validation: Path, **hyperparameters: Any) -> Any:
    """Uploads both files and creates a job. Returns the job."""
    job = service.create_job(
        client,
        training,
        validation,
        model="olora-tiny",
        hyperparameters={"n_epochs": 1, "batch_size": 8} | hyperparameters,
        suffix="quickstart",
        seed=42,
        extra_body={"adapter": {"method": "olora", "rank": 16}},
    )
    console.print(f"Created {job.id}: OLoRA of rank 16 on {job.model}, one epoch")
    return job


def show(folder: Path, job: Any) -> None:
    """Checks the adapter in PEFT, prints both models' answers and losses. Raises QuickstartError."""
    console.print("Loading the adapter in PEFT, on the untouched base ...")
    lines = VALIDATION.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[:MEASURED]]
    shown = [row for row in rows if len(row["messages"][0]["content"]) < 400][:SHOWN]
    model, tokenizer = peft_adapter.load(BASE, folder, rows)
    after = peft_adapter.mean_loss(model, tokenizer, rows)
    tuned = peft_adapter.answers(model, tokenizer, shown, LONGEST)
    with model.disable_adapter():
        before = peft_adapter.mean_loss(model, tokenizer, rows)
        untuned = peft_adapter.answers(model, tokenizer, shown, LONGEST)

    for row, old, new in zip(shown, untuned, tuned, strict=True):
        table = Table(show_header=False, box=None, padding=(0, 1))
        table.add_row("function", Text(row["messages"][0]["content"].partition("\n\n")[2]))
        table.add_row("before", Text(old))
        table.add_row("after", Text(new, style="green"))
        table.add_row("author", Text(row["messages"][1]["content"]))
        console.print(table)
        console.print()
    console.print(f"Loss on {len(rows)} held-out rows: {before:.3f} before, [green]{after:.3f}[/green] after")
    service.show_results(job, folder)


if __name__ == "__main__":
    sys.exit(main())
