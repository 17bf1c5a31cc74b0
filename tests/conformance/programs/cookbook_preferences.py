"""A notebook on direct preference optimisation, up to the first chat with its model."""

import csv
import io
import json
import time
from pathlib import Path

from openai import OpenAI

client = OpenAI()


def preference(row: dict, other: dict) -> dict:
    """The row's own answer is preferred to another row's."""
    *question, answer = row["messages"]
    return {
        "input": {"messages": question, "tools": [], "parallel_tool_calls": True},
        "preferred_output": [answer],
        "non_preferred_output": [other["messages"][-1]],
    }


rows = [json.loads(line) for line in Path("train.jsonl").read_text().splitlines()]
pairs = [preference(row, other) for row, other in zip(rows, rows[1:] + rows[:1], strict=True)]
Path("preferences.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
with open("preferences.jsonl", "rb") as stream:
    training_file = client.files.create(file=stream, purpose="fine-tune")

job = client.fine_tuning.jobs.create(
    model="gpt-4o-mini-2024-07-18",
    training_file=training_file.id,
    method={
        "type": "dpo",
        "dpo": {
            "hyperparameters": {
                "n_epochs": 1,
                "beta": 0.1,
                "batch_size": 4,
                "learning_rate_multiplier": 1.0,
            }
        },
    },
)
assert job.method.type == "dpo"
assert job.method.dpo.hyperparameters.beta == 0.1

deadline = time.monotonic() + 150
while job.status in ("validating_files", "queued", "running"):
    assert time.monotonic() < deadline, job.status
    time.sleep(1)
    job = client.fine_tuning.jobs.retrieve(job.id)
assert job.status == "succeeded", job.error

events = client.fine_tuning.jobs.list_events(job.id, limit=100).data
assert events[0].message == "The job has successfully completed"
metrics = [event.data for event in reversed(events) if event.type == "metrics"]
assert [one["step"] for one in metrics] == list(range(1, len(rows) // 4 + 1))

table = list(csv.DictReader(io.StringIO(client.files.content(job.result_files[0]).text)))
assert [int(row["step"]) for row in table] == [one["step"] for one in metrics]
assert abs(float(table[0]["train_loss"]) - 0.6931) < 1e-3  # ln 2: nothing is preferred yet

checkpoints = client.fine_tuning.jobs.checkpoints.list(job.id).data
assert checkpoints[0].step_number == len(table)

assert job.fine_tuned_model.startswith("ft:gpt-4o-mini-2024-07-18:")
assert client.models.retrieve(job.fine_tuned_model).id == job.fine_tuned_model
