"""DSPy: a program's model is fine-tuned; others are cancelled, one while it trains."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import dspy
import openai
from dspy.clients.openai import OpenAIProvider, TrainingJobOpenAI
from dspy.clients.utils_finetune import TrainDataFormat, TrainingStatus

ROWS = [json.loads(line) for line in Path("train.jsonl").read_text().splitlines()]


def launch(n_epochs: int = 1, **hyperparameters: int) -> TrainingJobOpenAI:
    """A job that the service knows: a thread of DSPy's has uploaded its rows, created it, and follows it."""
    lm = dspy.LM("openai/gpt-4o-mini-2024-07-18")
    job = lm.finetune(ROWS, TrainDataFormat.CHAT, {"n_epochs": n_epochs, **hyperparameters})
    wait_until(lambda: job.provider_job_id is not None or job.done())
    assert not job.done(), job.result()
    return job


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.1)


def a_cancelled_job_leaves_no_file(job: TrainingJobOpenAI) -> None:
    job_id, file_id = job.provider_job_id, job.provider_file_id
    assert OpenAIProvider.does_file_exist(file_id)
    job.cancel()
    assert job.cancelled()
    assert OpenAIProvider.get_training_status(job_id) == TrainingStatus.cancelled
    assert openai.fine_tuning.jobs.retrieve(job_id).status == "cancelled"
    try:
        openai.files.retrieve(file_id)
    except openai.NotFoundError:
        return
    raise AssertionError(f"{file_id} is still there")


def a_job_ends_in_a_model(job: TrainingJobOpenAI) -> None:
    tuned = job.result(timeout=150)
    assert isinstance(tuned, dspy.LM), repr(tuned)
    assert tuned.model.startswith("ft:gpt-4o-mini-2024-07-18:"), tuned.model
    assert OpenAIProvider.is_provider_model(tuned.model)
    assert job.status() == TrainingStatus.succeeded
    assert openai.models.retrieve(tuned.model).id == tuned.model


if __name__ == "__main__":
    running = launch(n_epochs=50, batch_size=1)
    wait_until(lambda: running.status() == TrainingStatus.running)
    queued, last = launch(), launch()
    assert queued.status() == TrainingStatus.pending
    a_cancelled_job_leaves_no_file(queued)
    assert running.status() == TrainingStatus.running
    a_cancelled_job_leaves_no_file(running)
    a_job_ends_in_a_model(last)
