"""LiteLLM's calls on files and fine-tuning jobs, with the service given in each call."""

import asyncio
import os
import time

import litellm
import openai

SERVICE = {
    "custom_llm_provider": "openai",
    "api_base": os.environ.pop("OPENAI_BASE_URL"),
    "api_key": os.environ.pop("OPENAI_API_KEY"),
}
del os.environ["OPENAI_API_BASE"]
MODEL = "gpt-4o-mini-2024-07-18"


def upload() -> str:
    with open("train.jsonl", "rb") as stream:
        file = litellm.create_file(file=stream, purpose="fine-tune", **SERVICE)
    assert file.purpose == "fine-tune"
    assert file.filename == "train.jsonl"
    assert file.bytes == os.path.getsize("train.jsonl")
    return file.id


def a_job_is_created_listed_and_cancelled(training_file: str) -> None:
    job = litellm.create_fine_tuning_job(model=MODEL, training_file=training_file, suffix="lite", **SERVICE)
    assert job.status in ("validating_files", "queued", "running")
    assert (job.model, job.training_file) == (MODEL, training_file)
    listed = litellm.list_fine_tuning_jobs(limit=5, **SERVICE)
    assert listed.data[0].id == job.id
    cancelled = litellm.cancel_fine_tuning_job(fine_tuning_job_id=job.id, **SERVICE)
    assert (cancelled.id, cancelled.status) == (job.id, "cancelled")
    assert litellm.retrieve_fine_tuning_job(fine_tuning_job_id=job.id, **SERVICE).status == "cancelled"


async def a_job_ends_in_a_model(training_file: str) -> None:
    job = await litellm.acreate_fine_tuning_job(
        model=f"openai/{MODEL}", training_file=training_file, hyperparameters={"n_epochs": 1}, **SERVICE
    )
    assert job.hyperparameters.n_epochs == 1
    deadline = time.monotonic() + 120
    while job.status in ("validating_files", "queued", "running"):
        assert time.monotonic() < deadline, job.status
        await asyncio.sleep(1)
        job = await litellm.aretrieve_fine_tuning_job(fine_tuning_job_id=job.id, **SERVICE)
    assert job.status == "succeeded", job.error
    assert job.fine_tuned_model.startswith(f"ft:{MODEL}:"), job.fine_tuned_model
    content = await litellm.afile_content(file_id=job.result_files[0], **SERVICE)
    assert content.text.startswith("step,train_loss,train_accuracy"), content.text


def a_file_is_deleted(file_id: str) -> None:
    assert file_id in [file.id for file in litellm.file_list(purpose="fine-tune", **SERVICE)]
    assert litellm.file_delete(file_id=file_id, **SERVICE).deleted
    try:
        litellm.file_retrieve(file_id=file_id, **SERVICE)
    except openai.NotFoundError as error:
        answer = str(error)
    else:
        raise AssertionError(f"{file_id} is still there")
    assert file_id in answer


if __name__ == "__main__":
    training = upload()
    a_job_is_created_listed_and_cancelled(training)
    asyncio.run(a_job_ends_in_a_model(training))
    a_file_is_deleted(training)
