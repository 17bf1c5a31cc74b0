"""The supervisor: from a claimable row to a row that says how it ended. One warm trainer serves all tests."""

import csv
import io
import json
import math
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet
from sqlalchemy import select

from olora_core.bases.loading import load_base
from olora_core.errors import TrainingError
from olora_core.progress import Step
from olora_core.specs import TrainSpec
from olora_core.training.train import train
from store import endings, files, progress
from store.errors import LeaseLost, StorageFull, StoreError
from store.models import Job, Metric, Worker
from store.statuses import ENDED
from store.storage import Storage
from tests.rows import chat_file
from tests.services import wait_until
from tests.worker.service import Service, exists
from worker.supervisor.lease import POLL_SECONDS
from worker.supervisor.supervisor import Supervisor

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LONG = {"rows": 64, "n_epochs": 40}
"""A job of 640 steps: longer than any test of it."""
RUINOUS = {"learning_rate": 10, "max_grad_norm": 1e9, "lora_alpha": 65536, "schedule": "constant"}
"""Two steps survive this; the third one's gradient is no number."""


@contextmanager
def at_work(supervisor: Supervisor, until: Callable[[], bool] = lambda: True) -> Iterator[Callable[[], None]]:
    """Wakes the supervisor in a thread, as Celery does, again and again `until` the condition holds.

    The block gets a function that waits for the end; leaving the block waits too.
    """

    def work() -> None:
        supervisor.run_until_idle()
        while not until():
            time.sleep(0.05)
            supervisor.run_until_idle()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()

    def finish() -> None:
        thread.join(60)
        assert not thread.is_alive()

    yield finish
    finish()


def trainer_pid(supervisor: Supervisor) -> int:
    trainer = supervisor.trainer
    assert trainer is not None
    return trainer.pid


def freed(service: Service, job_id: str) -> Any:
    """The job once nobody holds it."""
    return service.wait(job_id, lambda job: job.lease_owner is None, "the release of the device")


def test_a_job_becomes_a_certified_adapter(service: Service, supervisor: Supervisor) -> None:
    job_id = service.queue(rows=32, validation=chat_file(10, first=100))
    assert supervisor.run_until_idle() == 1
    job = service.job(job_id)
    assert (job.status, job.attempt, job.failures) == ("succeeded", 1, 0)
    assert job.certificate is not None
    assert job.certificate["passed"] is True
    assert job.fine_tuned_model is not None
    assert job.fine_tuned_model.startswith("ft:tiny:olora::")
    assert job.resolved is not None
    assert job.resolved["hyperparameters"]["learning_rate"] != "auto"
    assert (job.step, job.total_steps) == (16, 16)
    assert job.trained_tokens

    losses = service.losses(job_id)
    assert len(losses) == 16
    assert losses[-1] < losses[0]
    rows = list(csv.DictReader(io.StringIO(service.result(job_id, 0).decode())))
    assert [float(row["train_loss"]) for row in rows] == losses
    files = service.adapter(job_id)
    assert {"adapter_config.json", "adapter_model.safetensors", "manifest.json", "README.md"} <= files.keys()
    assert json.loads(files["manifest.json"])["certificate"]["passed"] is True


def test_a_job_on_an_alias_is_trained_on_its_base_and_named_after_the_alias(
    service: Service, supervisor: Supervisor
) -> None:
    job_id = service.queue(rows=32, max_steps=2)
    with service.write.begin() as session:
        session.scalars(select(Job).where(Job.id == job_id)).one().model = "gpt-4o-mini-2024-07-18"
    supervisor.run_until_idle()
    job = service.job(job_id)
    assert job.fine_tuned_model == f"ft:gpt-4o-mini-2024-07-18:olora::{job_id[-8:]}"
    config = json.loads(service.adapter(job_id)["adapter_config.json"])
    assert config["base_model_name_or_path"] == "tiny"


def test_merged_weights_are_the_jobs_model(service: Service, supervisor: Supervisor, tmp_path: Path) -> None:
    job_id = service.queue(
        rows=32, n_epochs=8, adapter={"method": "mora", "type": 6, "export": "merged"}, learning_rate=1e-2
    )
    assert supervisor.run_until_idle() == 1
    job = service.job(job_id)
    assert (job.status, job.error) == ("succeeded", None)
    assert job.certificate is not None
    assert job.certificate["passed"] is True
    assert job.certificate["as_written"]["dtype"] == "float32"
    assert any("of the update" in event.message for event in service.events(job_id))
    with service.write() as session:
        assert files.get_file(session, "default", job.result_files[1]).filename == "model.zip"

    for name, content in service.adapter(job_id).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["certificate"] == job.certificate
    assert not (tmp_path / "adapter_config.json").exists()
    trained, base = (
        load_base(tmp_path, name="trained"),
        load_base(service.settings.models_dir / "tiny", name="t"),
    )
    ids = trained.tokenizer("2 + 2 =", return_tensors="pt").input_ids
    assert trained.model.dtype == base.model.dtype
    assert (trained.model(ids).logits - base.model(ids).logits).abs().max() > 0.1


def test_preferences_are_trained_by_dpo(service: Service, supervisor: Supervisor) -> None:
    pairs = [
        {"prompt": f"{n} + 1 =", "chosen": f" {n + 1}", "rejected": f" {n}, or something else"}
        for n in range(42)
    ]
    lines = [json.dumps(pair).encode() + b"\n" for pair in pairs]
    job_id = service.queue(data=b"".join(lines[:32]), validation=b"".join(lines[32:]), type="dpo")
    assert supervisor.run_until_idle() == 1
    job = service.job(job_id)
    assert (job.status, job.error) == ("succeeded", None)
    assert job.certificate is not None
    assert job.certificate["passed"] is True
    assert job.certificate["valid_loss_before"] == pytest.approx(math.log(2), rel=1e-6)
    assert job.certificate["valid_loss_after"] < job.certificate["valid_loss_before"]
    assert job.resolved is not None
    assert (job.resolved["type"], job.resolved["hyperparameters"]["beta"]) == ("dpo", 0.1)
    losses = service.losses(job_id)
    assert losses[0] == pytest.approx(math.log(2), rel=1e-6)
    assert losses[-1] < losses[0]
    metrics = [event.data or {} for event in service.events(job_id) if event.type == "metrics"]
    assert {data["step"]: data["reward_margin"] for data in metrics}[16] > 0


def instructions(rows: int, first: int = 0) -> list[dict[str, str]]:
    return [
        {"instruction": "What follows?", "input": f"{n}", "output": f'{n + 1}, \n"next".'}
        for n in range(first, first + rows)
    ]


def as_csv(rows: list[dict[str, str]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows: list[dict[str, str]]) -> bytes:
    made = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), made)
    return made.getvalue()


def test_instructions_in_tables_are_trained_and_validated(service: Service, supervisor: Supervisor) -> None:
    """A CSV file to train on, and the same format in Parquet to validate on."""
    held_out = as_parquet(instructions(10, first=100))
    job_id = service.queue(data=as_csv(instructions(32)), validation=held_out)
    supervisor.run_until_idle()
    job = service.job(job_id)
    assert (job.status, job.error) == ("succeeded", None)
    assert job.certificate is not None
    assert job.certificate["valid_loss_after"] < job.certificate["valid_loss_before"]
    losses = service.losses(job_id)
    assert losses[-1] < losses[0]


def test_the_next_job_on_the_same_file_finds_it_tokenised_and_another_project_does_not(
    service: Service, supervisor: Supervisor
) -> None:
    data, kept = chat_file(32, first=500), service.settings.tokens_folder
    jobs = [service.queue(data=data), service.queue(data=data), service.queue(data=data, project="another")]
    before = set(kept.glob("*/*"))
    supervisor.run_until_idle()
    assert [service.job(job_id).status for job_id in jobs] == ["succeeded"] * 3
    first, second, third = (service.losses(job_id) for job_id in jobs)
    assert first == second == third
    folders = sorted(path.parent.name for path in set(kept.glob("*/*")) - before)
    assert folders == ["project-another", "project-default"]


def test_tokenised_files_are_kept_within_their_bound(service: Service) -> None:
    settings = service.settings.model_copy(update={"token_cache_mb": 0})
    supervisor = Supervisor(settings)
    job_id = service.queue(rows=32, max_steps=1)
    supervisor.run_until_idle()
    supervisor.close()
    assert service.job(job_id).status == "succeeded"
    assert list(settings.tokens_folder.glob("*/*")) == []


def test_the_first_step_is_recorded_before_the_second_arrives(
    service: Service, supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded: list[list[int]] = []
    record = progress.record

    def noted(*arguments: Any, **recording: Any) -> None:
        recorded.append([step["step"] for step in recording["steps"]])
        record(*arguments, **recording)

    monkeypatch.setattr(progress, "record", noted)
    monkeypatch.setattr("worker.supervisor.recorder.RECORD_SECONDS", 3600.0)
    service.queue(rows=32, n_epochs=1)
    supervisor.run_until_idle()
    written = [steps for steps in recorded if steps]
    assert written[0] == [1]
    assert [step for steps in written for step in steps] == list(range(1, 9)), "each once"


def test_the_events_tell_the_whole_job(service: Service, supervisor: Supervisor) -> None:
    job_id = service.queue(rows=32, validation=chat_file(10, first=100))
    supervisor.run_until_idle()
    messages = [event.message for event in service.events(job_id)]
    beginning = ["Created", "Validating", "Files validated", "Fine-tuning job started"]
    assert [part in message for part, message in zip(beginning, messages, strict=False)] == [True] * 4
    assert any(message.startswith("learning_rate = ") for message in messages)
    assert any(message.startswith("Before training: validation loss") for message in messages)
    metrics = [event.data or {} for event in service.events(job_id) if event.type == "metrics"]
    assert {data["step"] for data in metrics} == set(range(1, 17))
    assert any("full validation loss" in message for message in messages)
    assert messages[-2].startswith("New fine-tuned model created: ft:tiny:")
    assert "successfully completed" in messages[-1]
    assert service.warnings(job_id) == []


def test_a_step_is_one_event_also_where_a_checkpoint_falls_on_it(
    service: Service, supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    often = service.settings.model_copy(update={"checkpoint_seconds": 0.001})
    monkeypatch.setattr(supervisor, "settings", often)
    job_id = service.queue(rows=32, validation=chat_file(10, first=100))
    supervisor.run_until_idle()
    metrics = [event.data or {} for event in service.events(job_id) if event.type == "metrics"]
    assert [data["step"] for data in metrics] == list(range(1, 17))
    assert [data["step"] for data in metrics if "full_valid_loss" in data] == [8, 16]


@pytest.fixture
def _no_checkpoint_by_time(supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves those of epochs and evaluations, whose steps do not depend on how busy the machine is."""
    seldom = supervisor.settings.model_copy(update={"checkpoint_seconds": 3600.0})
    monkeypatch.setattr(supervisor, "settings", seldom)


@pytest.mark.usefixtures("_no_checkpoint_by_time")
def test_the_checkpoints_of_three_epochs_are_kept_and_nothing_else(
    service: Service, supervisor: Supervisor
) -> None:
    job_id = service.queue(rows=32, n_epochs=4)
    supervisor.run_until_idle()
    kept = service.checkpoints(job_id)
    assert [checkpoint.step for checkpoint in kept] == [32, 24, 16]
    stored = {key.rpartition("/")[0] for key in service.storage.list(f"jobs/{job_id}")}
    assert stored == {*(c.storage_key for c in kept), f"jobs/{job_id}/results/a1"}
    assert not list(service.settings.scratch_folder.glob("ftjob-*"))


def test_a_job_keeps_what_its_models_answer(service: Service, supervisor: Supervisor) -> None:
    job_id = service.queue(rows=32, validation=chat_file(10, first=100), n_epochs=1, samples=2)
    supervisor.run_until_idle()
    kept = service.job(job_id).samples
    assert kept is not None
    assert kept["file"] == "validation"
    assert [row["reference"] for row in kept["rows"]] == ["101 follows 100.", "102 follows 101."]
    assert all("What follows 10" in row["prompt"] for row in kept["rows"])
    manifest = service.adapter(job_id)["manifest.json"].decode().replace("\\u0000", "\ufffd")
    assert (
        json.loads(manifest)["samples"] == kept
    )  # an untrained base says anything, and no database holds NUL


@pytest.mark.usefixtures("_no_checkpoint_by_time")
def test_early_stopping_ends_a_job_and_keeps_its_best_checkpoint(
    service: Service, supervisor: Supervisor
) -> None:
    """The validation rows expect other answers than those that are learned."""
    wrong = chat_file(10).replace(b" follows ", b" precedes ")
    options = {"eval_steps": 4, "early_stopping_patience": 3, "learning_rate": 3e-3}
    job_id = service.queue(rows=32, n_epochs=40, validation=wrong, **options)
    supervisor.run_until_idle()
    job = service.job(job_id)
    assert (job.status, job.error, job.total_steps) == ("succeeded", None, 320)
    assert job.step < 320
    best = job.step - 3 * 4
    assert job.certificate is not None
    assert job.certificate["exported_step"] == best
    kept = {checkpoint.step: checkpoint for checkpoint in service.checkpoints(job_id)}
    ends_of_epochs = list(range(8, job.step + 1, 8))[-3:]
    assert set(kept) == {job.step, job.step - 4, best, *ends_of_epochs}
    full = {step: checkpoint.metrics["full_valid_loss"] for step, checkpoint in kept.items()}
    assert min(full, key=lambda step: full[step]) == best
    assert job.certificate["valid_loss_after"] == full[best]
    stored = {key.rpartition("/")[0] for key in service.storage.list(f"jobs/{job_id}")}
    assert stored == {*(c.storage_key for c in kept.values()), f"jobs/{job_id}/results/a1"}
    messages = [event.message for event in service.events(job_id)]
    assert any(f"training stops after step {job.step} of 320" in message for message in messages)
    assert any(f"The adapter of step {best} is exported" in message for message in messages)
    rows = list(csv.DictReader(io.StringIO(service.result(job_id, 0).decode())))
    evaluated = [int(row["step"]) for row in rows if row["full_valid_loss"]]
    assert evaluated == list(range(4, job.step + 1, 4))
    metrics = [event.data or {} for event in service.events(job_id) if event.type == "metrics"]
    assert [data["step"] for data in metrics if "full_valid_loss" in data] == evaluated


def test_one_trainer_serves_job_after_job(service: Service, supervisor: Supervisor) -> None:
    before = trainer_pid(supervisor)
    first, second = service.queue(rows=32), service.queue(rows=32)
    assert supervisor.run_until_idle() == 2
    assert trainer_pid(supervisor) == before
    assert service.tensors(first) == service.tensors(second)


class SlowStorage(Storage):
    """Takes longer to answer than the supervisor waits before it looks at its row again."""

    def list(self, prefix: str) -> list[str]:
        time.sleep(2 * POLL_SECONDS)
        return super().list(prefix)


def test_a_job_that_has_ended_is_not_taken_for_a_lost_one(service: Service, supervisor: Supervisor) -> None:
    before = trainer_pid(supervisor)
    supervisor.storage = SlowStorage(service.storage.root)
    job_id = service.queue(rows=32, n_epochs=1)
    supervisor.run_until_idle()
    supervisor.storage = service.storage
    assert service.job(job_id).status == "succeeded"
    assert trainer_pid(supervisor) == before
    assert exists(before)


class FailingStorage(Storage):
    """Raises an error instead of storing results."""

    error: StoreError

    def put_folder(self, prefix: str, folder: Path) -> None:
        if "/results/" in prefix:
            raise self.error
        super().put_folder(prefix, folder)


@contextmanager
def failing_storage(service: Service, supervisor: Supervisor, error: StoreError) -> Iterator[None]:
    storage = FailingStorage(service.storage.root)
    storage.error = error
    supervisor.storage = storage
    yield
    supervisor.storage = service.storage


def test_a_lost_lease_is_not_a_failed_job(service: Service, supervisor: Supervisor) -> None:
    """The attempt writes nothing more, although its row would still let it."""
    job_id = service.queue(rows=32, n_epochs=1)
    with failing_storage(service, supervisor, LeaseLost(job_id, 1)):
        supervisor.run_until_idle()
    job = service.job(job_id)
    assert (job.status, job.attempt, job.error) == ("running", 1, None)
    assert service.attempts(job_id)[0].ended_at is None
    service.wait(job_id, lambda job: job.lease_until < time.time(), "the end of the lease")
    with service.write.begin() as session:
        endings.sweep(session, service.settings)
    service.cancel(job_id)


def test_a_full_storage_is_not_a_failed_job(service: Service, supervisor: Supervisor) -> None:
    """The job is handed back, and another attempt may find room."""
    job_id = service.queue(rows=32, n_epochs=1)
    with failing_storage(service, supervisor, StorageFull("No space is left where files are stored.")):
        supervisor.run_until_idle()
    job = service.job(job_id)
    assert (job.status, job.attempt, job.failures, job.error) == ("queued", 1, 1, None)
    assert service.attempts(job_id)[0].end_reason == "storage_full"
    [warning] = service.warnings(job_id)
    assert warning.startswith("No space is left where files are stored.")
    service.cancel(job_id)


def test_the_shipped_base_model_is_trained_on_the_shipped_examples(
    service: Service, supervisor: Supervisor
) -> None:
    examples = (EXAMPLES / "docstrings" / "train.jsonl").read_bytes().splitlines(keepends=True)
    job_id = service.queue(model="olora-tiny", data=b"".join(examples[:40]), max_steps=5)
    supervisor.run_until_idle()
    job = service.job(job_id)
    assert (job.status, job.error) == ("succeeded", None)
    assert len(service.losses(job_id)) == 5


def test_without_jobs_nothing_happens(service: Service, supervisor: Supervisor) -> None:
    assert supervisor.run_until_idle() == 0


def test_a_trainer_that_has_seen_one_projects_data_never_sees_anothers(service: Service) -> None:
    supervisor = Supervisor(service.settings)
    service.queue(model="nothing")
    supervisor.run_until_idle()
    first = trainer_pid(supervisor)
    service.queue(model="nothing", project="another")
    supervisor.run_until_idle()
    assert trainer_pid(supervisor) != first
    assert not exists(first)
    supervisor.close()


def test_an_idle_worker_gives_its_trainers_memory_back(service: Service) -> None:
    supervisor = Supervisor(service.settings.model_copy(update={"idle_seconds": 0.5}))
    service.queue(model="nothing")
    supervisor.run_until_idle()
    pid = trainer_pid(supervisor)
    wait_until(lambda: not exists(pid), "the end of the trainer", seconds=10)
    supervisor.close()


def test_a_cancelled_job_has_ended_at_once_and_its_trainer_stops_at_the_next_step(
    service: Service, supervisor: Supervisor
) -> None:
    job_id = service.queue(**LONG)
    with at_work(supervisor):
        service.wait_for_step(job_id, 3)
        service.cancel(job_id)
        asked = time.monotonic()
        job = service.job(job_id)
        assert (job.status, job.error) == ("cancelled", None)
        told = len(service.events(job_id))
        freed(service, job_id)
        assert time.monotonic() - asked < 5
    assert len(service.losses(job_id)) < 640
    assert len(service.events(job_id)) == told
    assert supervisor.trainer is not None
    assert supervisor.trainer.alive


def test_a_base_model_that_is_gone_fails_the_job_with_a_sentence(
    service: Service, supervisor: Supervisor
) -> None:
    job_id = service.queue(model="tini")
    supervisor.run_until_idle()
    job = service.job(job_id)
    assert job.status == "failed"
    assert job.error is not None
    assert job.error["code"] == "model_not_available"
    assert "did you mean 'tiny'" in job.error["message"]


def test_a_training_file_that_is_gone_fails_the_job_with_a_sentence(
    service: Service, supervisor: Supervisor
) -> None:
    job_id = service.queue()
    service.storage.delete(f"files/{service.job(job_id).training_file}")
    supervisor.run_until_idle()
    error = service.job(job_id).error
    assert error is not None
    assert (error["code"], error["param"]) == ("invalid_training_file", "training_file")
    assert "upload it again" in error["message"]


def test_a_file_that_cannot_be_trained_on_fails_the_job_at_once(
    service: Service, supervisor: Supervisor
) -> None:
    """Its rows are right, but none has a trained token within the context that was asked for."""
    job_id = service.queue(context_length=16)
    supervisor.run_until_idle()
    job = service.job(job_id)
    assert (job.status, job.attempt) == ("failed", 1)
    assert job.error is not None
    assert job.error["code"] == "invalid_training_file"


def test_a_job_that_is_no_longer_finite_fails_at_once_and_keeps_its_last_good_checkpoint(
    service: Service,
    supervisor: Supervisor,
    monkeypatch: pytest.MonkeyPatch,
    models_dir: Path,
    tmp_path: Path,
) -> None:
    often = service.settings.model_copy(update={"checkpoint_seconds": 0.001})
    monkeypatch.setattr(supervisor, "settings", often)
    data = chat_file(32)
    job_id = service.queue(data=data, **RUINOUS)
    supervisor.run_until_idle()
    job = service.job(job_id)
    assert (job.status, job.attempt, job.step) == ("failed", 1, 2)
    assert job.error is not None
    assert (job.error["code"], job.error["param"]) == ("not_finite", "hyperparameters.learning_rate")
    assert "Step 3 is not finite and was not applied" in job.error["message"]
    assert "The checkpoint of step 2 is kept." in job.error["message"]
    assert service.events(job_id)[-1].message == f"The job failed: {job.error['message']}"

    with service.write() as session:
        listed = progress.list_checkpoints(session, job_id).data
    assert [checkpoint.step for checkpoint in listed] == [2, 1]
    assert listed[0].storage_key is not None
    service.storage.fetch_folder(listed[0].storage_key, tmp_path / "checkpoint")
    (tmp_path / "rows.jsonl").write_bytes(data)
    spec, base = TrainSpec.model_validate(job.resolved), load_base(models_dir / "tiny", name="tiny")
    paths = {"training": tmp_path / "rows.jsonl", "validation": None, "folder": tmp_path / "run"}
    steps = []
    with pytest.raises(TrainingError, match="Step 3 is not finite"):
        steps.extend(
            update
            for update in train(spec, base, **paths, resume=tmp_path / "checkpoint")
            if isinstance(update, Step)
        )
    assert steps == []


def test_what_a_killed_attempt_stored_without_a_row_is_removed(
    service: Service, supervisor: Supervisor
) -> None:
    job_id = service.queue(rows=32)
    with service.storage.writer(f"jobs/{job_id}/checkpoints/99-a0/state.json") as writer:
        writer.write(b"{}")
    supervisor.run_until_idle()
    assert service.job(job_id).status == "succeeded"
    assert not any("99-a0" in key for key in service.storage.list(f"jobs/{job_id}"))


def test_a_stopping_worker_hands_its_job_back_and_another_resumes_it(
    service: Service, supervisor: Supervisor
) -> None:
    """The stored checkpoints are damaged meanwhile: the newest is passed over, the one before is taken."""
    uninterrupted = service.queue(rows=32, n_epochs=8)
    supervisor.run_until_idle()
    job_id = service.queue(rows=32, n_epochs=8)
    stopping = Supervisor(service.settings)
    with at_work(stopping) as finish:
        service.wait_for_checkpoint(job_id, 2)
        stopping.stop()
        finish()
    assert stopping.run_until_idle() == 0
    trainer = trainer_pid(stopping)
    stopping.close()
    assert not exists(trainer)
    job = service.job(job_id)
    assert (job.status, job.attempt, job.failures) == ("queued", 1, 0)
    assert service.warnings(job_id) == []
    newest, before = service.checkpoints(job_id)[:2]
    assert newest.step == job.step

    path = service.settings.storage_folder / f"{newest.storage_key}/adapter.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    supervisor.run_until_idle()
    job = service.job(job_id)
    assert (job.status, job.attempt, job.failures) == ("succeeded", 2, 0)
    assert service.warnings(job_id) == [
        f"The checkpoint at step {newest.step} cannot be used; "
        f"the job resumes from the one before, at step {before.step}."
    ]
    assert service.losses(job_id) == service.losses(uninterrupted)
    assert service.tensors(job_id) == service.tensors(uninterrupted)


def test_a_silent_trainer_is_killed_as_hung(service: Service, supervisor: Supervisor) -> None:
    job_id = service.queue(**LONG)
    supervisor.settings = service.settings.model_copy(update={"stall_seconds": 1.0})
    with at_work(supervisor):
        service.wait_for_step(job_id, 2)
        hung = trainer_pid(supervisor)
        os.kill(hung, signal.SIGSTOP)
    supervisor.settings = service.settings
    assert not exists(hung)
    job = service.job(job_id)
    assert (job.status, job.failures) == ("queued", 1)
    [warning] = service.warnings(job_id)
    assert "sent no message for 1 s" in warning
    service.cancel(job_id)


def test_three_crashes_without_progress_end_the_job_with_a_sentence(
    service: Service, supervisor: Supervisor
) -> None:
    job_id = service.queue(**LONG)
    for attempt in (1, 2, 3):
        with at_work(supervisor, until=lambda attempt=attempt: service.job(job_id).attempt == attempt):
            wait_until(lambda attempt=attempt: service.job(job_id).attempt == attempt, "an attempt")
            wait_until(lambda: supervisor.trainer is not None and supervisor.trainer.alive, "its trainer")
            os.kill(trainer_pid(supervisor), signal.SIGKILL)
    job = service.job(job_id)
    assert (job.status, job.attempt, job.failures) == ("failed", 3, 3)
    assert job.error is not None
    assert job.error["code"] == "trainer_lost"
    assert "3 times" in job.error["message"]
    assert "was killed (out of memory?)" in job.error["message"]
    assert len(service.warnings(job_id)) == 2


# --- pausing -------------------------------------------------------------------------------------------


def test_a_paused_job_holds_no_device_and_goes_on_bit_for_bit(
    service: Service, supervisor: Supervisor
) -> None:
    uninterrupted = service.queue(rows=64, n_epochs=24)
    supervisor.run_until_idle()
    job_id = service.queue(rows=64, n_epochs=24)
    with at_work(supervisor):
        service.wait_for_step(job_id, 5)
        assert service.pause(job_id).status == "paused"
        job = freed(service, job_id)
    assert (job.status, job.attempt, job.stage) == ("paused", 1, None)
    assert supervisor.run_until_idle() == 0
    assert supervisor.trainer is not None
    assert supervisor.trainer.alive, "another job may have it, warm"
    assert service.checkpoints(job_id)[0].step == job.step < 384
    assert service.events(job_id)[-1].message == (
        f"The job is paused and holds no device; it resumes from step {job.step}."
    )
    service.resume(job_id)
    assert supervisor.run_until_idle() == 1
    job = service.job(job_id)
    assert (job.status, job.attempt, job.failures) == ("succeeded", 2, 0)
    assert service.warnings(job_id) == []
    assert service.losses(job_id) == service.losses(uninterrupted)
    assert service.tensors(job_id) == service.tensors(uninterrupted)


@pytest.mark.parametrize("way", ["stopped", "paused", "resumed"])
def test_who_gives_a_job_back_leaves_alone_what_the_next_attempt_has_stored(
    service: Service, way: str
) -> None:
    """The next attempt may have claimed the job already, and stored a checkpoint that no row names yet."""
    leaving = Supervisor(service.settings)
    job_id = service.queue(**LONG)
    with at_work(leaving) as finish:
        service.wait_for_step(job_id, 1)
        with service.storage.writer(f"jobs/{job_id}/checkpoints/9-a2/state.json") as writer:
            writer.write(b"{}")
        if way == "stopped":
            leaving.stop()
        else:
            service.pause(job_id)
        if way == "resumed":
            service.resume(job_id)
            leaving.stop()
        finish()
    leaving.close()
    assert service.job(job_id).status in ("queued", "paused")
    assert any("9-a2" in key for key in service.storage.list(f"jobs/{job_id}"))
    service.cancel(job_id)


def test_a_job_paused_before_its_first_step_begins_again(service: Service, supervisor: Supervisor) -> None:
    job_id = service.queue(**LONG)
    with at_work(supervisor):
        service.wait(job_id, lambda job: job.status == "running", "the claim")
        service.pause(job_id)
        job = freed(service, job_id)
    assert job.status == "paused"
    service.cancel(job_id)
    assert service.job(job_id).status == "cancelled"


def test_a_job_resumed_at_once_is_not_trained_twice_at_a_time(
    service: Service, supervisor: Supervisor
) -> None:
    job_id = service.queue(rows=32, n_epochs=8)
    other = Supervisor(service.settings)
    done = lambda: service.job(job_id).status in ENDED  # noqa: E731
    with at_work(supervisor, until=done), at_work(other, until=done):
        for _ in range(3):
            step = service.job(job_id).step
            service.wait(job_id, lambda job, step=step: job.step > step or job.status in ENDED, "a step")
            if done():
                break
            service.pause(job_id)
            service.resume(job_id)
        service.wait_for_end(job_id)
    other.close()
    assert service.job(job_id).status == "succeeded"
    assert len(service.losses(job_id)) == 64
    spans = [(attempt.started_at, attempt.ended_at) for attempt in service.attempts(job_id)]
    assert len(spans) > 1
    assert all(ended <= begun for (_, ended), (begun, _) in pairwise(spans))


@pytest.mark.parametrize("limit", ["max_seconds", "finish_by", "max_train_tokens"])
def test_a_job_is_paused_at_its_limit_and_goes_on_when_resumed(
    service: Service, supervisor: Supervisor, limit: str
) -> None:
    service.queue(rows=32, max_steps=1)  # starts the trainer, unless it is there
    supervisor.run_until_idle()
    values = {"max_seconds": 6, "finish_by": int(time.time()) + 8, "max_train_tokens": 3000}
    much_longer = LONG | {"rows": 640}  # than six seconds, on any machine
    job_id = service.queue(**much_longer, options={limit: values[limit]})
    supervisor.run_until_idle()
    job = service.job(job_id)
    assert (job.status, job.pause_reason, job.error) == ("paused", limit, None)
    assert 0 < job.step < 6400
    assert service.checkpoints(job_id)[0].step == job.step
    [told] = [event for event in service.events(job_id) if event.data == {"reason": limit}]
    assert limit in told.message
    if limit == "max_train_tokens":
        with service.write() as session:
            rows = session.scalars(select(Metric).where(Metric.job_id == job_id).order_by(Metric.step)).all()
        tokens = [row.values["trained_tokens"] for row in rows]
        assert 3000 <= sum(tokens) < 6000
    before = job.step
    service.resume(job_id)
    with at_work(supervisor):
        service.wait_for_step(job_id, before + 1)
        service.cancel(job_id)


def test_its_stages_are_in_its_row_and_its_events(service: Service, supervisor: Supervisor) -> None:
    job_id = service.queue(data=chat_file(64, first=900), samples=1, validation=chat_file(10, first=800))
    seen: list[str] = []
    with at_work(supervisor):

        def look(job: Any) -> bool:
            if job.stage is not None and job.stage["name"] not in seen:
                seen.append(job.stage["name"])
                assert 0 <= job.stage["done"] <= job.stage["total"]
            return job.status in ENDED

        service.wait(job_id, look, "the end")
    assert service.job(job_id).stage is None
    told = [event.data["stage"] for event in service.events(job_id) if event.data and "stage" in event.data]
    assert len(told) == len(set(told))
    expected = ["fetching", "tokenising", "training", "evaluating", "exporting", "certifying", "publishing"]
    assert [name for name in expected if name not in told] == []
    assert told.index("tokenising") < told.index("training") < told.index("exporting")
    assert told.index("exporting") < told.index("certifying") < told.index("publishing")
    assert "training" in seen


def test_a_worker_tells_that_it_is_there_and_what_it_does(service: Service) -> None:
    worker = Supervisor(service.settings)
    worker.begin()

    def row() -> Any:
        with service.write() as session:
            return session.get(Worker, worker.owner)

    wait_until(row, "its row")
    assert row().host == platform.node()
    assert row().memory_bytes > 2**30
    assert row().versions["torch"] == version("torch")
    job_id = service.queue(**LONG)
    with at_work(worker):
        wait_until(lambda: row().job_id == job_id, "its job")
        service.cancel(job_id)
    wait_until(lambda: row().job_id is None, "the end of its job")
    worker.close()
    assert row() is None
