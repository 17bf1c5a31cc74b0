"""The database goes away during a job: within the lease nothing happens, after it another attempt resumes."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from sqlalchemy import make_url, select

from store import claims
from store.models import Job
from store.session import DATABASE_AWAY, make_engine
from tests.faults.fleet import LEASE_SECONDS, Fleet
from tests.faults.proxy import Door
from tests.worker.service import Service, exists
from worker.supervisor.supervisor import Supervisor

JOB = {"rows": 64, "n_epochs": 12}


@pytest.fixture
def door(postgres_url: str) -> Iterator[Door]:
    port = make_url(postgres_url).port
    assert port is not None
    door = Door(port)
    yield door
    door.shut()


@contextmanager
def woken_repeatedly(supervisor: Supervisor) -> Iterator[None]:
    """As the dispatcher would do it."""
    done = threading.Event()

    def work() -> None:
        while not done.wait(0.1):
            supervisor.run_until_idle()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    yield
    done.set()
    thread.join(60)
    assert not thread.is_alive()


def test_a_worker_that_freezes_inside_a_transaction_loses_its_row(
    production: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = production.service
    job_id = service.queue(**JOB)
    monkeypatch.setattr("store.session.FROZEN_SECONDS", 1)
    frozen = make_engine(service.settings.database_url)
    with frozen.connect() as connection:
        with service.write.begin() as session:
            assert claims.claim(session, owner="frozen", lease_seconds=0.1)
        connection.execute(select(Job.id).where(Job.id == job_id).with_for_update())
        service.wait(job_id, lambda job: job.status == "queued", "the sweep", seconds=10)
        with pytest.raises(DATABASE_AWAY):
            connection.execute(select(Job.id))
    frozen.dispose()
    [warning] = service.warnings(job_id)
    assert "was lost" in warning


def test_a_job_outlives_its_database(production: Fleet, door: Door) -> None:
    service: Service = production.service
    behind = make_url(service.settings.database_url).set(port=door.port).render_as_string(hide_password=False)
    supervisor = Supervisor(service.settings.model_copy(update={"database_url": behind}))
    short, long = service.submit(**JOB), service.submit(**JOB)
    with woken_repeatedly(supervisor):
        service.wait_for_checkpoint(short)
        door.shut()
        time.sleep(LEASE_SECONDS / 3)
        door.open()
        job = service.wait_for_end(short)
        assert (job.status, job.attempt) == ("succeeded", 1)
        assert service.warnings(short) == []

        service.wait_for_checkpoint(long)
        assert supervisor.trainer is not None
        trainer = supervisor.trainer.pid
        door.shut()
        service.wait(long, lambda job: job.status == "queued", "the end of the lease")
        assert not exists(trainer)
        door.open()
        job = service.wait_for_end(long)
        assert (job.status, job.attempt) == ("succeeded", 2)
        [warning] = service.warnings(long)
        assert "was lost" in warning
    supervisor.close()
    supervisor.engine.dispose()
    assert service.losses(long) == service.losses(short)
    assert service.tensors(long) == service.tensors(short)
