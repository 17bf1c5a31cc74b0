"""What unmodified code written for OpenAI's API does, against a running service.

`test_clients.py` runs this file in a process of its own under each version of the official client, over real
sockets. Each check prints one JSON line; a check may use what an earlier one left in `World`.
"""

import base64
import csv
import io
import json
import os
import sys
import time
import traceback
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
from openai import OpenAI

ENDED = ("succeeded", "failed", "cancelled")


@dataclass
class World:
    """The clients, and what the checks have made so far."""

    client: OpenAI
    lossy: OpenAI
    training: Path
    validation: Path
    foreign: OpenAI
    ids: dict[str, str] = field(default_factory=dict)


def chat_line(number: int) -> str:
    return json.dumps(
        {
            "messages": [
                {"role": "user", "content": f"Say {number}."},
                {"role": "assistant", "content": f"It is {number}."},
            ]
        }
    )


def chat_file(rows: int = 12) -> bytes:
    return "\n".join(chat_line(number) for number in range(rows)).encode()


def expect(kind: type[Exception], call: Callable[[], object]) -> Any:
    """Calls, and returns the exception of exactly this class that it must raise."""
    try:
        call()
    except openai.APIError as error:
        raised = error
    else:
        raise AssertionError(f"expected {kind.__name__}, nothing was raised")
    assert type(raised) is kind, f"{type(raised).__name__}: {raised}"
    return raised


def files_go_up_from_a_path(world: World) -> None:
    with world.training.open("rb") as stream:
        created = world.client.files.create(file=stream, purpose="fine-tune")
    assert created.object == "file"
    assert created.id.startswith("file-")
    assert created.bytes == world.training.stat().st_size
    assert created.filename == world.training.name
    assert created.purpose == "fine-tune"
    assert abs(created.created_at - time.time()) < 120
    assert created._request_id.startswith("req_")
    world.ids["training"] = created.id
    with world.validation.open("rb") as stream:
        world.ids["validation"] = world.client.files.create(file=stream, purpose="fine-tune").id


def files_go_up_from_memory_without_a_name(world: World) -> None:
    created = world.client.files.create(file=io.BytesIO(chat_file()), purpose="fine-tune")
    assert created.filename == "upload"
    world.ids["memory"] = created.id


def files_may_expire(world: World) -> None:
    created = world.client.files.create(
        file=("named.jsonl", chat_file()),
        purpose="fine-tune",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    assert created.filename == "named.jsonl"
    assert created.expires_at == created.created_at + 3600
    world.client.files.delete(created.id)


def files_are_ready_for_those_who_wait(world: World) -> None:
    assert world.client.files.wait_for_processing(world.ids["training"]).status == "processed"
    assert world.client.files.retrieve(world.ids["training"]).status == "processed"


def files_come_back_byte_for_byte(world: World) -> None:
    assert world.client.files.content(world.ids["training"]).read() == world.training.read_bytes()
    assert world.client.files.content(world.ids["memory"]).content == chat_file()


def files_are_listed_in_pages(world: World) -> None:
    made = [world.client.files.create(file=chat_file(), purpose="fine-tune").id for _ in range(5)]
    newest_first = [file.id for file in world.client.files.list(limit=2, purpose="fine-tune")]
    assert len(newest_first) == len(set(newest_first))
    assert newest_first[:5] == made[::-1]
    assert {world.ids["training"], world.ids["memory"]} <= set(newest_first)
    oldest_first = [file.id for file in world.client.files.list(limit=3, order="asc", purpose="fine-tune")]
    assert oldest_first == newest_first[::-1]
    assert not any(file.id in made for file in world.client.files.list(purpose="batch"))
    for file_id in made:
        assert world.client.files.delete(file_id).deleted is True


def deleted_files_are_gone(world: World) -> None:
    answer = world.client.files.delete(world.ids["memory"])
    assert (answer.id, answer.object, answer.deleted) == (world.ids["memory"], "file", True)
    error = expect(openai.NotFoundError, lambda: world.client.files.retrieve(world.ids["memory"]))
    assert world.ids["memory"] in error.message
    expect(openai.NotFoundError, lambda: world.client.files.content(world.ids["memory"]))
    expect(openai.NotFoundError, lambda: world.client.files.delete(world.ids["memory"]))


def files_that_are_not_jsonl_are_refused(world: World) -> None:
    error = expect(
        openai.BadRequestError, lambda: world.client.files.create(file=b"no rows\n", purpose="fine-tune")
    )
    assert "Expected file to have JSONL format" in error.message
    assert "Line 1" in error.message
    assert error.param == "file"
    assert error.type == "invalid_request_error"
    assert error.request_id.startswith("req_")


def models_can_be_looked_up(world: World) -> None:
    listed = world.client.models.list()
    base = next(model for model in listed if model.id == "olora-tiny")
    assert base.object == "model"
    assert isinstance(base.created, int)
    assert world.client.models.retrieve("olora-tiny").id == "olora-tiny"
    expect(openai.NotFoundError, lambda: world.client.models.retrieve("no/such model"))


def the_main_job_is_created(world: World) -> None:
    job = world.client.fine_tuning.jobs.create(
        model="olora-tiny",
        training_file=world.ids["training"],
        validation_file=world.ids["validation"],
        suffix="conformance",
        seed=7,
        metadata={"team": "conformance", "client": openai.__version__},
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": 4, "max_steps": 6}},
        },
        extra_body={"adapter": {"method": "olora", "rank": 8}, "olora": {"priority": 5}},
    )
    assert job.object == "fine_tuning.job"
    assert job.id.startswith("ftjob-")
    assert job.status in ("validating_files", "queued", "running")
    assert job.model == "olora-tiny"
    assert job.training_file == world.ids["training"]
    assert job.validation_file == world.ids["validation"]
    assert job.seed == 7
    assert job.error is None
    assert job.finished_at is None
    assert job.fine_tuned_model is None
    assert job.result_files == []
    assert job.organization_id
    assert job.metadata == {"team": "conformance", "client": openai.__version__}
    assert job.hyperparameters.n_epochs == 1
    assert job.hyperparameters.batch_size == 4
    assert job.hyperparameters.learning_rate_multiplier == "auto"
    assert job.method.type == "supervised"
    assert job.method.supervised.hyperparameters.n_epochs == 1
    assert job.adapter["method"] == "olora"
    assert job.adapter["rank"] == 8
    assert job.adapter["alpha"] == 16
    assert job.olora["priority"] == 5
    assert job.user_provided_suffix == "conformance"
    world.ids["job"] = job.id


def old_code_with_hyperparameters_at_the_top_works(world: World) -> None:
    job = world.client.fine_tuning.jobs.create(
        model="olora-tiny",
        training_file=world.ids["training"],
        hyperparameters={"n_epochs": 2, "batch_size": "auto", "learning_rate_multiplier": 0.5},
    )
    assert job.hyperparameters.n_epochs == 2
    assert job.hyperparameters.batch_size == "auto"
    assert job.hyperparameters.learning_rate_multiplier == 0.5
    cancelled = world.client.fine_tuning.jobs.cancel(job.id)
    assert (cancelled.id, cancelled.status) == (job.id, "cancelled")
    again = world.client.fine_tuning.jobs.cancel(job.id)
    assert again.status == "cancelled"
    assert isinstance(again.finished_at, int)
    world.ids["cancelled"] = job.id


def a_job_may_name_a_tracker(world: World) -> None:
    job = world.client.fine_tuning.jobs.create(
        model="olora-tiny",
        training_file=world.ids["training"],
        integrations=[{"type": "wandb", "wandb": {"project": "tuning", "name": "first", "tags": ["a"]}}],
    )
    world.client.fine_tuning.jobs.cancel(job.id)
    [integration] = job.integrations
    assert type(integration).__name__ == "FineTuningJobWandbIntegrationObject"
    assert integration.type == "wandb"
    assert integration.wandb.project == "tuning"
    assert integration.wandb.name == "first"
    assert integration.wandb.entity is None
    assert integration.wandb.tags == ["a"]
    refused = expect(
        openai.BadRequestError,
        lambda: world.client.fine_tuning.jobs.create(
            model="olora-tiny",
            training_file=world.ids["training"],
            integrations=[{"type": "mlflow", "mlflow": {"experiment": "tuning"}}],
        ),
    )
    assert refused.code == "integration_not_configured"
    assert refused.param == "integrations[0].type"


def jobs_are_listed_in_pages_and_by_metadata(world: World) -> None:
    jobs = world.client.fine_tuning.jobs
    made = []
    for number in range(22):
        job = jobs.create(
            model="olora-tiny",
            training_file=world.ids["training"],
            metadata={"batch": "of 22 & more", "number": str(number), "client": openai.__version__},
            extra_body={"olora": {"priority": 0}},
        )
        jobs.cancel(job.id)
        made.append(job.id)
    listed = [job.id for job in jobs.list()]
    assert len(listed) == len(set(listed))
    assert listed[:22] == made[::-1]
    assert world.ids["job"] in listed
    first = jobs.list()
    assert len(first.data) == 20
    assert first.has_more is True
    mine = {"batch": "of 22 & more", "client": openai.__version__}
    assert [job.id for job in jobs.list(metadata=mine, limit=10)] == made[::-1]
    assert [job.id for job in jobs.list(metadata={**mine, "number": "7"})] == [made[7]]
    assert not list(jobs.list(metadata={**mine, "batch": "of 22"}))
    without = [job.id for job in jobs.list(extra_query={"metadata": "null"})]
    assert world.ids["cancelled"] in without
    assert world.ids["job"] not in without


def a_retry_after_a_lost_answer_makes_one_job(world: World) -> None:
    mark = f"lost answer {openai.__version__}"
    job = world.lossy.fine_tuning.jobs.create(
        model="olora-tiny", training_file=world.ids["training"], metadata={"mark": mark}
    )
    found = list(world.client.fine_tuning.jobs.list(metadata={"mark": mark}))
    assert [one.id for one in found] == [job.id]
    world.client.fine_tuning.jobs.cancel(job.id)


def a_retry_of_an_upload_makes_one_file(world: World) -> None:
    content = chat_file(17) + openai.__version__.encode().join(
        [b'\n{"messages": [{"role": "user", "content": "', b'"}, {"role": "assistant", "content": "x"}]}']
    )
    first = world.client.files.create(file=content, purpose="fine-tune")
    retry = {"x-stainless-retry-count": "1"}
    again = world.client.files.create(file=content, purpose="fine-tune", extra_headers=retry)
    deliberate = world.client.files.create(file=content, purpose="fine-tune")
    assert again.id == first.id
    assert deliberate.id != first.id
    world.client.files.delete(first.id)
    world.client.files.delete(deliberate.id)


def an_idempotency_key_makes_one_job(world: World) -> None:
    key = {"Idempotency-Key": f"conformance-{openai.__version__}-{time.time()}"}

    def create(model: str = "olora-tiny", epochs: int = 1) -> Any:
        return world.client.fine_tuning.jobs.create(
            model=model,
            training_file=world.ids["training"],
            hyperparameters={"n_epochs": epochs},
            extra_headers=key,
        )

    job = create()
    assert create().id == job.id
    error = expect(openai.BadRequestError, lambda: create(epochs=2))
    assert error.code == "idempotency_key_reused"
    world.client.fine_tuning.jobs.cancel(job.id)


def errors_have_their_classes(world: World) -> None:
    create = world.client.fine_tuning.jobs.create
    training = world.ids["training"]
    error = expect(openai.BadRequestError, lambda: create(model="olora-tyni", training_file=training))
    assert error.code == "model_not_available"
    assert error.param == "model"
    assert "olora-tiny" in error.message
    error = expect(openai.BadRequestError, lambda: create(model="olora-tiny", training_file="file-missing"))
    assert error.param == "training_file"
    assert "file-missing" in error.message
    error = expect(
        openai.BadRequestError,
        lambda: create(model="olora-tiny", training_file=training, hyperparameters={"n_epochs": 0}),
    )
    assert error.param == "hyperparameters.n_epochs"
    error = expect(
        openai.BadRequestError,
        lambda: create(model="olora-tiny", training_file=training, method={"type": "reinforcement"}),
    )
    assert error.param == "method.type"
    error = expect(
        openai.BadRequestError,
        lambda: create(model="olora-tiny", training_file=training, extra_body={"adaptor": {}}),
    )
    assert "adapter" in error.message
    expect(openai.NotFoundError, lambda: world.client.fine_tuning.jobs.retrieve("ftjob-missing"))
    expect(openai.NotFoundError, lambda: world.client.fine_tuning.jobs.cancel("ftjob-missing"))
    expect(openai.NotFoundError, lambda: world.client.fine_tuning.jobs.pause("ftjob-missing"))
    error = expect(openai.AuthenticationError, lambda: world.foreign.files.list())
    assert error.code == "invalid_api_key"
    assert error.status_code == 401


def wait_for(world: World, job_id: str, seconds: float = 90) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        job = world.client.fine_tuning.jobs.retrieve(job_id)
        if job.status in ENDED:
            return job
        assert job.status in ("validating_files", "queued", "running")
        time.sleep(0.3)
    raise AssertionError(f"{job_id} is still {job.status} after {seconds} s")


def the_main_job_succeeds(world: World) -> None:
    job = wait_for(world, world.ids["job"])
    assert job.status == "succeeded", job.error
    assert job.error is None
    assert job.fine_tuned_model.startswith("ft:olora-tiny:")
    assert ":conformance:" in job.fine_tuned_model
    assert isinstance(job.finished_at, int)
    assert job.trained_tokens > 0
    assert job.hyperparameters.batch_size == 4
    assert isinstance(job.hyperparameters.learning_rate_multiplier, float)
    assert job.method.supervised.hyperparameters.learning_rate_multiplier == 1.0
    assert job.estimated_finish is None
    assert job.olora["certificate"]["passed"] is True
    assert len(job.result_files) == 3


def its_events_read_newest_first_in_pages(world: World) -> None:
    jobs = world.client.fine_tuning.jobs
    events = list(jobs.list_events(world.ids["job"], limit=3))
    assert len({event.id for event in events}) == len(events)
    messages = [event.message for event in reversed(events)]
    assert messages[0] == f"Created fine-tuning job: {world.ids['job']}"
    assert messages[1].startswith(f"Validating training file: {world.ids['training']}")
    assert "Files validated, moving job to queued state" in messages
    assert "Fine-tuning job started" in messages
    assert "successfully completed" in messages[-1]
    metrics = [event for event in reversed(events) if event.type == "metrics"]
    assert [event.data["step"] for event in metrics] == list(range(1, 7))
    assert all(event.data["total_steps"] == 6 for event in metrics)
    assert all(event.message.startswith(f"Step {event.data['step']}/6: training loss=") for event in metrics)
    assert all(event.object == "fine_tuning.job.event" for event in events)


def its_checkpoints_are_listed(world: World) -> None:
    job = world.client.fine_tuning.jobs.retrieve(world.ids["job"])
    checkpoints = list(world.client.fine_tuning.jobs.checkpoints.list(job.id, limit=1))
    assert checkpoints
    for checkpoint in checkpoints:
        assert checkpoint.object == "fine_tuning.job.checkpoint"
        assert checkpoint.fine_tuning_job_id == job.id
        name = f"{job.fine_tuned_model}:ckpt-step-{checkpoint.step_number}"
        assert checkpoint.fine_tuned_model_checkpoint == name
        assert checkpoint.metrics.train_loss > 0


def its_first_result_is_the_csv_and_its_third_tensorboards(world: World) -> None:
    job = world.client.fine_tuning.jobs.retrieve(world.ids["job"])
    metrics, adapter, event_file = job.result_files
    file = world.client.files.retrieve(metrics)
    assert file.purpose == "fine-tune-results"
    text = world.client.files.content(metrics).text
    rows = list(csv.DictReader(io.StringIO(text)))
    assert list(rows[0])[:5] == [
        "step",
        "train_loss",
        "train_accuracy",
        "valid_loss",
        "valid_mean_token_accuracy",
    ]
    assert [int(row["step"]) for row in rows] == list(range(1, 7))
    assert all(float(row["train_loss"]) > 0 for row in rows)
    encoded = world.client.files.content(metrics, extra_query={"encoding": "base64"}).read()
    assert base64.b64decode(encoded).decode() == text
    packed = world.client.files.content(adapter).read()
    assert "adapter_model.safetensors" in zipfile.ZipFile(io.BytesIO(packed)).namelist()
    assert world.client.files.retrieve(event_file).filename.startswith("events.out.tfevents.")
    assert b"train/loss" in world.client.files.content(event_file).read()


def its_adapter_can_be_downloaded(world: World) -> None:
    job_id = world.ids["job"]
    packed = world.client.get(f"/fine_tuning/jobs/{job_id}/adapter", cast_to=bytes_of_response())
    names = zipfile.ZipFile(io.BytesIO(packed.content)).namelist()
    assert {"adapter_model.safetensors", "adapter_config.json", "manifest.json", "README.md"} <= set(names)


def bytes_of_response() -> Any:
    from openai._legacy_response import HttpxBinaryResponseContent

    return HttpxBinaryResponseContent


def its_model_is_listed_and_can_be_deleted(world: World) -> None:
    job = world.client.fine_tuning.jobs.retrieve(world.ids["job"])
    name = job.fine_tuned_model
    assert name in [model.id for model in world.client.models.list()]
    model = world.client.models.retrieve(name)
    assert (model.id, model.owned_by) == (name, job.organization_id)
    answer = world.client.models.delete(name)
    assert (answer.id, answer.object, answer.deleted) == (name, "model", True)
    expect(openai.NotFoundError, lambda: world.client.models.retrieve(name))
    assert name not in [model.id for model in world.client.models.list()]
    assert world.client.fine_tuning.jobs.retrieve(job.id).fine_tuned_model == name


def a_job_is_paused_and_resumed(world: World) -> None:
    jobs = world.client.fine_tuning.jobs
    job = jobs.create(
        model="olora-tiny",
        training_file=world.ids["training"],
        hyperparameters={"n_epochs": 1},
        extra_body={"olora": {"auto_start": False}},
    )
    for _ in range(2):
        assert jobs.pause(job.id).status == "paused"
    for _ in range(2):
        assert jobs.resume(job.id).status in ("queued", "running")
    assert jobs.pause(job.id).status == "paused"
    assert jobs.cancel(job.id).status == "cancelled"
    error = expect(openai.BadRequestError, lambda: jobs.resume(job.id))
    assert "was cancelled" in error.message


def only_the_status_paused_is_new_to_strict_clients(world: World) -> None:
    strict = OpenAI(
        base_url=str(world.client.base_url),
        api_key=world.client.api_key,
        _strict_response_validation=True,
    )
    job_id = world.ids["job"]
    strict.files.list(limit=5)
    strict.models.list()
    strict.fine_tuning.jobs.retrieve(job_id)
    strict.fine_tuning.jobs.list(limit=5)
    strict.fine_tuning.jobs.list_events(job_id, limit=100)
    strict.fine_tuning.jobs.checkpoints.list(job_id)
    waiting = world.client.fine_tuning.jobs.create(
        model="olora-tiny",
        training_file=world.ids["training"],
        extra_body={"olora": {"auto_start": False}},
    )
    world.client.fine_tuning.jobs.pause(waiting.id)
    try:
        strict.fine_tuning.jobs.retrieve(waiting.id)
    except openai.APIResponseValidationError:
        refused = True
    else:
        refused = False
    assert refused, "the type in the client has 'paused' now: say so in docs/api.md"
    assert strict.fine_tuning.jobs.cancel(waiting.id).status == "cancelled"


def preferences_are_trained_on_the_supervised_result(world: World) -> None:
    """As OpenAI's guide recommends: supervised training first, then DPO on its model."""
    rows = [json.loads(line)["messages"] for line in world.training.read_text().splitlines()]
    pairs = [
        {
            "input": {"messages": messages[:-1]},
            "preferred_output": messages[-1:],
            "non_preferred_output": [{"role": "assistant", "content": f"No. {number}"}],
        }
        for number, messages in enumerate(rows)
    ]
    data = "\n".join(map(json.dumps, pairs)).encode()
    file = world.client.files.create(file=("pairs.jsonl", data), purpose="fine-tune")
    first = world.client.fine_tuning.jobs.retrieve(world.ids["job"])
    job = world.client.fine_tuning.jobs.create(
        model=first.fine_tuned_model,
        training_file=file.id,
        method={
            "type": "dpo",
            "dpo": {"hyperparameters": {"beta": 0.1, "n_epochs": 1, "batch_size": 8}},
        },
    )
    assert job.model == first.fine_tuned_model
    ended = wait_for(world, job.id)
    assert ended.status == "succeeded", ended.error
    assert ended.fine_tuned_model.startswith("ft:olora-tiny:")
    events = list(world.client.fine_tuning.jobs.list_events(job.id, limit=100))
    losses = {e.data["step"]: e.data["train_loss"] for e in events if e.type == "metrics"}
    assert abs(losses[1] - 0.693147) < 1e-5, losses
    assert any("Training starts at the former model" in event.message for event in events)
    world.client.models.delete(ended.fine_tuned_model)


def its_checkpoint_is_a_model_with_an_adapter(world: World) -> None:
    job_id = world.ids["job"]
    checkpoint = world.client.fine_tuning.jobs.checkpoints.list(job_id).data[0]
    name = checkpoint.fine_tuned_model_checkpoint
    assert world.client.models.retrieve(name).id == name
    assert name in [model.id for model in world.client.models.list()]
    path = f"/fine_tuning/jobs/{job_id}/checkpoints/{checkpoint.id}/adapter"
    patient = world.client.with_options(max_retries=20)  # the answer is 503 until a worker has made it
    packed = patient.get(path, cast_to=bytes_of_response())
    assert "adapter_model.safetensors" in zipfile.ZipFile(io.BytesIO(packed.content)).namelist()


def a_job_that_has_ended_cannot_be_cancelled(world: World) -> None:
    error = expect(openai.BadRequestError, lambda: world.client.fine_tuning.jobs.cancel(world.ids["job"]))
    assert "succeeded" in error.message


CHECKS: tuple[Callable[[World], None], ...] = (
    files_go_up_from_a_path,
    files_go_up_from_memory_without_a_name,
    the_main_job_is_created,
    files_may_expire,
    files_are_ready_for_those_who_wait,
    files_come_back_byte_for_byte,
    files_are_listed_in_pages,
    deleted_files_are_gone,
    files_that_are_not_jsonl_are_refused,
    models_can_be_looked_up,
    errors_have_their_classes,
    a_retry_after_a_lost_answer_makes_one_job,
    a_retry_of_an_upload_makes_one_file,
    an_idempotency_key_makes_one_job,
    old_code_with_hyperparameters_at_the_top_works,
    a_job_may_name_a_tracker,
    jobs_are_listed_in_pages_and_by_metadata,
    the_main_job_succeeds,
    its_events_read_newest_first_in_pages,
    its_checkpoints_are_listed,
    its_first_result_is_the_csv_and_its_third_tensorboards,
    its_adapter_can_be_downloaded,
    its_checkpoint_is_a_model_with_an_adapter,
    preferences_are_trained_on_the_supervised_result,
    only_the_status_paused_is_new_to_strict_clients,
    its_model_is_listed_and_can_be_deleted,
    a_job_is_paused_and_resumed,
    a_job_that_has_ended_cannot_be_cancelled,
)


def main() -> None:
    url, lossy_url, training, validation = sys.argv[1:]
    key = os.environ["OPENAI_API_KEY"]
    world = World(
        client=OpenAI(base_url=url, api_key=key),
        lossy=OpenAI(base_url=lossy_url, api_key=key),
        foreign=OpenAI(base_url=url, api_key="no-such-key"),
        training=Path(training),
        validation=Path(validation),
    )
    sys.stdout.write(json.dumps({"version": openai.__version__}) + "\n")
    for check in CHECKS:
        try:
            check(world)
            trouble = None
        except Exception:
            trouble = traceback.format_exc()
        sys.stdout.write(json.dumps({"check": check.__name__, "trouble": trouble}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
