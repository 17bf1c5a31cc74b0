"""LlamaIndex's fine-tuning engine, to the end of its job: what follows is a chat."""

import time

from llama_index.finetuning import OpenAIFinetuneEngine

MODEL = "gpt-4o-mini-2024-07-18"


def a_job_ends_in_a_model() -> str:
    # Its own check of the rows would download OpenAI's tokenizer, to estimate a price.
    engine = OpenAIFinetuneEngine(MODEL, "train.jsonl", validate_json=False)
    engine.finetune()
    job = engine.get_current_job()
    assert job.model == MODEL
    deadline = time.monotonic() + 120
    while job.status in ("validating_files", "queued", "running"):
        assert time.monotonic() < deadline, job.status
        time.sleep(1)
        job = engine.get_current_job()
    assert job.status == "succeeded", job.error
    assert job.fine_tuned_model.startswith(f"ft:{MODEL}:")
    assert engine.get_finetuned_model().model == job.fine_tuned_model
    return job.id


def an_engine_finds_a_former_job(job_id: str) -> None:
    job = OpenAIFinetuneEngine(MODEL, "train.jsonl", start_job_id=job_id).get_current_job()
    assert (job.id, job.status) == (job_id, "succeeded")


if __name__ == "__main__":
    an_engine_finds_a_former_job(a_job_ends_in_a_model())
