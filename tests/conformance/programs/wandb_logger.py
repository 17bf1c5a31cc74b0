"""Weights & Biases' integration for fine-tuning jobs logs one that has succeeded."""

import csv
import io
import os
import time
from pathlib import Path

os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_BASE_URL"] = "http://127.0.0.1:9"  # where it looks for a former run, even offline

from openai import OpenAI
from wandb.integration.openai.fine_tuning import WandbLogger

client = OpenAI()


def upload(path: str) -> str:
    with open(path, "rb") as stream:
        return client.files.create(file=stream, purpose="fine-tune").id


job = client.fine_tuning.jobs.create(
    model="gpt-4o-mini-2024-07-18",
    training_file=upload("train.jsonl"),
    validation_file=upload("valid.jsonl"),
    hyperparameters={"n_epochs": 1, "batch_size": 4},
)
deadline = time.monotonic() + 120
while job.status in ("validating_files", "queued", "running"):
    assert time.monotonic() < deadline, job.status
    time.sleep(1)
    job = client.fine_tuning.jobs.retrieve(job.id)
assert job.status == "succeeded", job.error

WandbLogger._logged_in = (
    True  # it wants a login even offline, where none is possible; nor are input artifacts
)
answer = WandbLogger.sync(fine_tune_job_id=job.id, openai_client=client, log_datasets=False)
assert "completed successfully" in answer, answer

[path] = Path("wandb").glob(f"offline-run-*-{job.id}/*.wandb")
logged = path.read_bytes()
assert job.fine_tuned_model.encode() in logged
table = list(csv.DictReader(io.StringIO(client.files.content(job.result_files[0]).text)))
assert len(table) == 3
for row in table:
    assert str(float(row["train_loss"])).encode() in logged, row
assert str(float(table[-1]["full_valid_loss"])).encode() in logged
