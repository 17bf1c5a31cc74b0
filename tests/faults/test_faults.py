"""Faults in the middle of a job: nothing is lost, nothing is done twice, and the adapter is the same.

The service is embedded: SQLite, a folder as the queue, and real workers with real trainers.
"""

import os
import signal
import time
from dataclasses import dataclass

import pytest
from sqlalchemy import text

from store.models import Job
from tests.faults.fleet import LEASE_SECONDS, Fleet, Worker
from tests.services import wait_until
from tests.worker.service import Service, exists

JOB = {"rows": 64, "n_epochs": 24}
"""384 steps, a few seconds."""


@dataclass
class Uninterrupted:
    losses: list[float]
    tensors: bytes


@pytest.fixture(scope="module")
def uninterrupted(embedded: Fleet) -> Uninterrupted:
    """What the job gives when nothing happens to it."""
    embedded.keep(1)
    job_id = embedded.service.submit(**JOB)
    embedded.service.wait_for_end(job_id)
    return Uninterrupted(embedded.service.losses(job_id), embedded.service.tensors(job_id))


def in_the_middle(fleet: Fleet) -> tuple[str, Worker]:
    """A job with a checkpoint behind it and most of its steps before it, and the worker that has it."""
    job_id = fleet.service.submit(**JOB)
    fleet.service.wait_for_checkpoint(job_id)
    job = fleet.service.job(job_id)
    assert job.status == "running"
    assert job.step < 150
    return job_id, fleet.holder(job_id)


def assert_as_if_nothing_had_happened(service: Service, job_id: str, uninterrupted: Uninterrupted) -> Job:
    job = service.job(job_id)
    assert (job.status, job.error) == ("succeeded", None)
    assert service.losses(job_id) == uninterrupted.losses
    assert service.tensors(job_id) == uninterrupted.tensors
    messages = [event.message for event in service.events(job_id)]
    assert sum("New fine-tuned model created" in message for message in messages) == 1
    assert sum("Fine-tuning job started" in message for message in messages) == 1
    results = {key.split("/")[3] for key in service.storage.list(f"jobs/{job_id}/results")}
    assert results == {f"a{job.attempt}"}
    return job


def test_a_killed_trainer_costs_a_few_steps(embedded: Fleet, uninterrupted: Uninterrupted) -> None:
    embedded.keep(1)
    job_id, worker = in_the_middle(embedded)
    os.kill(worker.trainer(), signal.SIGKILL)
    embedded.service.wait_for_end(job_id)
    job = assert_as_if_nothing_had_happened(embedded.service, job_id, uninterrupted)
    assert (job.attempt, job.failures) == (2, 0)
    [warning] = embedded.service.warnings(job_id)
    assert "was killed (out of memory?)" in warning
    assert worker.process.poll() is None


def test_a_killed_worker_takes_its_trainer_along_and_another_goes_on(
    embedded: Fleet, uninterrupted: Uninterrupted
) -> None:
    embedded.keep(1)
    job_id, worker = in_the_middle(embedded)
    trainer = worker.trainer()
    worker.send(signal.SIGKILL)
    wait_until(lambda: not exists(trainer), "the end of the trainer", seconds=2)
    worker.process.wait()
    orphan = embedded.service.settings.scratch_folder / f"{job_id}-1"
    assert orphan.is_dir()

    embedded.keep(1)
    embedded.service.wait_for_end(job_id)
    job = assert_as_if_nothing_had_happened(embedded.service, job_id, uninterrupted)
    assert job.attempt == 2
    [warning] = embedded.service.warnings(job_id)
    assert "was lost" in warning
    assert "resumes from step" in warning
    assert not orphan.exists()


def test_a_stopped_worker_hands_its_job_back_uncounted(embedded: Fleet, uninterrupted: Uninterrupted) -> None:
    embedded.keep(1)
    job_id, worker = in_the_middle(embedded)
    trainer, step = worker.trainer(), embedded.service.job(job_id).step
    worker.send(signal.SIGTERM)
    began = time.monotonic()
    job = embedded.service.wait(job_id, lambda job: job.status == "queued", "the hand-back", seconds=10)
    assert worker.process.wait(15) == 0
    assert time.monotonic() - began < 15
    assert not exists(trainer)
    assert (job.attempt, job.failures) == (1, 0)
    assert embedded.service.warnings(job_id) == []
    assert embedded.service.checkpoints(job_id)[0].step == job.step >= step

    embedded.keep(1)
    embedded.service.wait_for_end(job_id)
    job = assert_as_if_nothing_had_happened(embedded.service, job_id, uninterrupted)
    assert (job.attempt, job.failures) == (2, 0)
    assert embedded.service.warnings(job_id) == []


def test_a_worker_that_slept_too_long_changes_nothing(embedded: Fleet, uninterrupted: Uninterrupted) -> None:
    embedded.keep(2)
    job_id, sleeper = in_the_middle(embedded)
    trainer = sleeper.trainer()
    with embedded.service.write.begin() as session:
        # While the test has SQLite's one lock for writers, the sleeper does not fall asleep with it.
        session.execute(text("SELECT 1"))
        sleeper.send(signal.SIGSTOP)
    stopped = time.monotonic()
    try:
        wait_until(lambda: not exists(trainer), "the trainer's own end", seconds=LEASE_SECONDS)
        embedded.service.wait(job_id, lambda job: job.attempt == 2, "another attempt")
        embedded.service.wait_for_end(job_id)
        before = embedded.service.traces_at_rest(job_id)
        assert time.monotonic() - stopped > LEASE_SECONDS
    finally:
        sleeper.send(signal.SIGCONT)
    wait_until(lambda: sleeper.name in embedded.ping(), "an answer of the sleeper")
    time.sleep(LEASE_SECONDS / 2)
    assert embedded.service.traces(job_id) == before
    assert_as_if_nothing_had_happened(embedded.service, job_id, uninterrupted)
    [warning] = embedded.service.warnings(job_id)
    assert "was lost" in warning


def test_a_message_that_comes_ten_times_starts_one_attempt(
    embedded: Fleet, uninterrupted: Uninterrupted
) -> None:
    embedded.keep(2)
    job_id, worker = in_the_middle(embedded)
    embedded.wake(10)
    assert worker.name in embedded.ping(2.0)
    assert embedded.service.job(job_id).status == "running"
    embedded.service.wait_for_end(job_id)
    job = assert_as_if_nothing_had_happened(embedded.service, job_id, uninterrupted)
    assert job.attempt == 1

    before = embedded.service.traces_at_rest(job_id)
    embedded.wake(5)
    wait_until(lambda: embedded.waiting() == 0, "the taking of the messages")
    time.sleep(0.5)
    assert embedded.service.traces(job_id) == before
    assert embedded.service.warnings(job_id) == []


def test_a_second_signal_does_not_wait_for_a_checkpoint(embedded: Fleet) -> None:
    embedded.keep(1)
    job_id, worker = in_the_middle(embedded)
    trainer = worker.trainer()
    os.kill(trainer, signal.SIGSTOP)  # it will not reach its next step
    worker.send(signal.SIGTERM)
    time.sleep(0.5)
    assert worker.process.poll() is None
    worker.send(signal.SIGTERM)
    assert worker.process.wait(15) == 0
    assert not exists(trainer)
    [attempt] = embedded.service.attempts(job_id)[:1]
    assert attempt.end_reason == "released"
    assert embedded.service.job(job_id).failures == 0
    assert embedded.service.warnings(job_id) == []
