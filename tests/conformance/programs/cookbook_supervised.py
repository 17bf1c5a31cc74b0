"""A notebook on supervised fine-tuning, up to the first chat with its model."""

import csv
import io
import json
import time
from pathlib import Path

from openai import OpenAI

client = OpenAI()


def upload(path: str) -> str:
    with open(path, "rb") as stream:
        return client.files.create(file=stream, purpose="fine-tune").id


rows = [json.loads(line) for line in Path("train.jsonl").read_text().splitlines()]
assert all(row["messages"][-1]["role"] == "assistant" for row in rows)
training_file, validation_file = upload("train.jsonl"), upload("valid.jsonl")

job = client.fine_tuning.jobs.create(
    model="gpt-4o-mini-2024-07-18",
    training_file=training_file,
    validation_file=validation_file,
    suffix="docstrings",
    seed=1,
    method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": 4}}},
)
assert (job.model, job.method.type) == ("gpt-4o-mini-2024-07-18", "supervised")
assert job.id in [one.id for one in client.fine_tuning.jobs.list(limit=10)]

deadline = time.monotonic() + 150
while job.status in ("validating_files", "queued", "running"):
    assert time.monotonic() < deadline, job.status
    time.sleep(1)
    job = client.fine_tuning.jobs.retrieve(job.id)
assert job.status == "succeeded", job.error
assert job.trained_tokens > 0

events = client.fine_tuning.jobs.list_events(fine_tuning_job_id=job.id, limit=100).data
messages = [event.message for event in reversed(events)]
assert messages[0] == f"Created fine-tuning job: {job.id}"
assert messages[-1] == "The job has successfully completed"
assert "Fine-tuning job started" in messages
losses = [event.data["train_loss"] for event in reversed(events) if event.type == "metrics"]

content = client.files.content(job.result_files[0])
table = list(csv.DictReader(io.StringIO(content.text)))
assert len(table) == len(rows) // 4
assert [float(row["train_loss"]) for row in table] == losses
assert float(table[-1]["valid_loss"]) > 0

checkpoints = client.fine_tuning.jobs.checkpoints.list(job.id).data
assert checkpoints[0].step_number == len(table)
assert checkpoints[0].metrics.full_valid_loss > 0
assert checkpoints[0].fine_tuned_model_checkpoint.startswith(job.fine_tuned_model)

assert job.fine_tuned_model.startswith("ft:gpt-4o-mini-2024-07-18:")
assert ":docstrings:" in job.fine_tuned_model
assert client.models.retrieve(job.fine_tuned_model).id == job.fine_tuned_model
