"""The `openai` command of the client's version 1: it uploads, creates, lists, follows and cancels."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

COMMAND = Path(sys.executable).with_name("openai")
MODEL = "gpt-4o-mini-2024-07-18"


def run(*arguments: str) -> Any:
    done = subprocess.run([str(COMMAND), "api", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def refused(*arguments: str) -> str:
    done = subprocess.run([str(COMMAND), "api", *arguments], capture_output=True, text=True)
    assert done.returncode == 1, done.stdout
    return done.stderr


def upload(path: str) -> str:
    file = run("files.create", "-f", path, "-p", "fine-tune")
    assert (file["filename"], file["purpose"], file["object"]) == (path, "fine-tune", "file")
    return file["id"]


def create(training_file: str, *arguments: str) -> dict[str, Any]:
    job = run("fine_tuning.jobs.create", "-m", MODEL, "-F", training_file, *arguments)
    assert job["status"] in ("validating_files", "queued", "running")
    assert (job["model"], job["training_file"]) == (MODEL, training_file)
    return job


def a_job_ends_in_a_model(training_file: str, validation_file: str) -> None:
    hyperparameters = json.dumps({"n_epochs": 1, "batch_size": 4})
    job = create(training_file, "-V", validation_file, "-s", "command", "-H", hyperparameters)
    assert job["validation_file"] == validation_file
    other = create(training_file)
    cancelled = run("fine_tuning.jobs.cancel", "-i", other["id"])
    assert (cancelled["id"], cancelled["status"]) == (other["id"], "cancelled")
    listed = run("fine_tuning.jobs.list", "-l", "2")
    assert [one["id"] for one in listed["data"]] == [other["id"], job["id"]]
    after = run("fine_tuning.jobs.list", "-l", "1", "-a", other["id"])
    assert [one["id"] for one in after["data"]] == [job["id"]]

    deadline = time.monotonic() + 120
    while job["status"] in ("validating_files", "queued", "running"):
        assert time.monotonic() < deadline, job["status"]
        time.sleep(1)
        job = run("fine_tuning.jobs.retrieve", "-i", job["id"])
    assert job["status"] == "succeeded", job["error"]
    assert job["fine_tuned_model"].startswith(f"ft:{MODEL}:olora:command:")
    events = run("fine_tuning.jobs.list_events", "-i", job["id"], "-l", "5")
    assert len(events["data"]) == 5
    assert events["data"][0]["message"] == "The job has successfully completed"
    assert "succeeded" in refused("fine_tuning.jobs.cancel", "-i", job["id"])


if __name__ == "__main__":
    a_job_ends_in_a_model(upload("train.jsonl"), upload("valid.jsonl"))
    assert "ftjob-missing" in refused("fine_tuning.jobs.retrieve", "-i", "ftjob-missing")
