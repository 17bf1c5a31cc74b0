"""A job on several devices in the service; on a CPU these are processes. One warm trainer leads them all."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.rows import chat_file
from tests.services import wait_until
from tests.worker.service import Service, exists
from worker.supervisor.supervisor import Supervisor

TWO = {"devices": 2}
LONG = {"rows": 64, "n_epochs": 40, "options": TWO}
"""A job of 640 steps: longer than any test of it."""


@pytest.fixture(scope="module")
def supervisor(service: Service) -> Iterator[Supervisor]:
    supervisor = Supervisor(service.settings.model_copy(update={"devices_per_worker": 2}))
    yield supervisor
    supervisor.close()


def peers(service: Service) -> list[int]:
    """Processes that follow a trainer of this service."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        ours = any(str(service.settings.home).encode() in word for word in command)
        if ours and b"worker.trainer.peer" in command and exists(int(folder.name)):
            found.append(int(folder.name))
    return found


def begun(service: Service, supervisor: Supervisor, **job: Any) -> tuple[str, threading.Thread]:
    """A job that has trained a few steps, and whoever works on it."""
    job_id = service.queue(**job)
    thread = threading.Thread(target=supervisor.run_until_idle, daemon=True)
    thread.start()
    service.wait_for_checkpoint(job_id)
    return job_id, thread


def test_two_devices_give_the_losses_of_one_and_one_certified_adapter(
    service: Service, supervisor: Supervisor
) -> None:
    job = {"rows": 18, "validation": chat_file(5, first=100), "micro_batch_size": 2}
    alone, together = service.queue(**job), service.queue(**job, options=TWO)
    sharded = service.queue(**job, options=TWO, sharding="full")
    assert supervisor.run_until_idle() == 3
    for job_id in (together, sharded):
        made = service.job(job_id)
        assert (made.status, made.error, made.failures) == ("succeeded", None, 0)
        assert made.certificate is not None
        assert made.certificate["passed"] is True
        assert service.losses(job_id) == pytest.approx(service.losses(alone), rel=0, abs=1e-5)
        for key in ("valid_loss_before", "valid_loss_after"):
            expected = service.job(alone).certificate
            assert expected is not None
            assert made.certificate[key] == pytest.approx(expected[key], rel=0, abs=1e-5)
    wait_until(lambda: peers(service) == [], "the end of the peers")


def test_two_devices_train_on_from_a_model_as_one_does(service: Service, supervisor: Supervisor) -> None:
    first = service.queue(rows=18, n_epochs=1)
    supervisor.run_until_idle()
    made = service.job(first)
    former = {"former_model": str(made.fine_tuned_model), "former_file": made.result_files[1]}
    job = {"rows": 18, "micro_batch_size": 2, "former": former, "learning_rate": 1e-3}
    for adapter in ({"method": "olora"}, {"method": "lora"}):
        alone, together, sharded = (
            service.queue(**job, adapter=adapter),
            service.queue(**job, adapter=adapter, options=TWO),
            service.queue(**job, adapter=adapter, options=TWO, sharding="full"),
        )
        supervisor.run_until_idle()
        for job_id in (together, sharded):
            made = service.job(job_id)
            assert (made.status, made.error, made.failures) == ("succeeded", None, 0)
            assert service.losses(job_id) == pytest.approx(service.losses(alone), rel=0, abs=1e-5)


def test_a_killed_peer_ends_the_attempt_and_the_next_one_goes_on(
    service: Service, supervisor: Supervisor
) -> None:
    job = {"rows": 64, "n_epochs": 8, "options": TWO}
    unbroken = service.queue(**job)
    supervisor.run_until_idle()
    job_id, thread = begun(service, supervisor, **job)
    (peer,) = peers(service)
    os.kill(peer, signal.SIGKILL)
    killed = time.monotonic()
    wait_until(lambda: service.job(job_id).failures == 1, "the end of the attempt", seconds=10)
    assert time.monotonic() - killed < 10
    assert "process of one device was killed" in service.warnings(job_id)[-1]
    thread.join(60)
    wait_until(lambda: supervisor.run_until_idle() or service.job(job_id).status == "succeeded", "its rest")
    assert service.wait_for_end(job_id).status == "succeeded"
    assert service.tensors(job_id) == service.tensors(unbroken)
    wait_until(lambda: peers(service) == [], "the end of the peers")


def test_a_cancelled_job_leaves_no_peer_and_the_trainer_stays(
    service: Service, supervisor: Supervisor
) -> None:
    job_id, thread = begun(service, supervisor, **LONG)
    assert supervisor.trainer is not None
    trainer = supervisor.trainer.pid
    service.cancel(job_id)
    assert service.wait_for_end(job_id).status == "cancelled"
    thread.join(60)
    wait_until(lambda: peers(service) == [], "the end of the peers")
    after = service.queue(rows=16, n_epochs=1)
    supervisor.run_until_idle()
    assert service.job(after).status == "succeeded"
    assert supervisor.trainer.pid == trainer


def test_a_killed_trainer_takes_its_peers_along(service: Service, supervisor: Supervisor) -> None:
    job_id, thread = begun(service, supervisor, **LONG)
    assert supervisor.trainer is not None
    os.kill(supervisor.trainer.pid, signal.SIGKILL)
    wait_until(lambda: peers(service) == [], "the end of the peers", seconds=20)
    service.cancel(job_id)
    service.wait_for_end(job_id)
    thread.join(60)


def test_trouble_of_the_job_is_its_sentence_not_a_lost_process(
    service: Service, supervisor: Supervisor
) -> None:
    job_id = service.queue(rows=16, options=TWO, context_length=1000)
    supervisor.run_until_idle()
    job = service.job(job_id)
    assert job.status == "failed"
    assert job.error is not None
    assert job.error["param"] == "hyperparameters.context_length"


def test_more_devices_than_the_worker_owns_is_a_clear_failure(
    service: Service, supervisor: Supervisor
) -> None:
    job_id = service.queue(rows=16, options={"devices": 3})
    supervisor.run_until_idle()
    job = service.job(job_id)
    assert job.status == "failed"
    assert job.error is not None
    assert (job.error["code"], job.error["param"]) == ("too_many_devices", "olora.devices")
    assert "own 2 each" in job.error["message"]
    assert "OLORA_DEVICES_PER_WORKER" in job.error["message"]
