"""Code written for `openai` before its version 1: module-level calls, and settings from the environment."""

import csv
import io
import time

import openai

MODEL = "gpt-4o-mini-2024-07-18"


def upload() -> str:
    with open("train.jsonl", "rb") as stream:
        named = openai.File.create(file=stream, purpose="fine-tune", user_provided_filename="named.jsonl")
    assert named.filename == "named.jsonl"
    with open("train.jsonl", "rb") as stream:
        file = openai.File.create(file=stream, purpose="fine-tune")
    assert (file.object, file.filename, file.purpose) == ("file", "file", "fine-tune")
    assert {file.id, named.id} <= {one.id for one in openai.File.list().data}
    assert openai.File.delete(named.id).deleted
    with open("train.jsonl", "rb") as stream:
        assert openai.File.download(file.id) == stream.read()
    return file.id


def a_job_is_created_listed_and_cancelled(training_file: str) -> None:
    job = openai.FineTuningJob.create(
        training_file=training_file, model=MODEL, hyperparameters={"n_epochs": 3}, suffix="old"
    )
    assert (job.object, job.model) == ("fine_tuning.job", MODEL)
    assert job.hyperparameters.n_epochs == 3
    assert [one.id for one in openai.FineTuningJob.list(limit=1).data] == [job.id]
    cancelled = openai.FineTuningJob.cancel(job.id)
    assert (cancelled.id, cancelled.status) == (job.id, "cancelled")


def a_job_ends_in_a_model(training_file: str) -> str:
    job = openai.FineTuningJob.create(
        training_file=training_file, model=MODEL, hyperparameters={"n_epochs": 1}
    )
    deadline = time.monotonic() + 120
    while job.status in ("validating_files", "queued", "running"):
        assert time.monotonic() < deadline, job.status
        time.sleep(1)
        job = openai.FineTuningJob.retrieve(job.id)
    assert job.status == "succeeded", job.error
    events = openai.FineTuningJob.list_events(id=job.id, limit=10)
    assert events.data[0].message == "The job has successfully completed"
    table = list(csv.DictReader(io.StringIO(openai.File.download(job.result_files[0]).decode())))
    assert float(table[-1]["train_loss"]) > 0
    assert job.fine_tuned_model.startswith(f"ft:{MODEL}:")
    return job.fine_tuned_model


def a_model_is_deleted(name: str) -> None:
    assert openai.Model.retrieve(name).id == name
    assert openai.Model.delete(name).deleted
    try:
        openai.Model.retrieve(name)
    except openai.error.InvalidRequestError as error:
        status, answer = error.http_status, str(error)
    else:
        raise AssertionError(f"{name} is still there")
    assert status == 404
    assert name in answer


if __name__ == "__main__":
    training = upload()
    a_job_is_created_listed_and_cancelled(training)
    a_model_is_deleted(a_job_ends_in_a_model(training))
