"""PostgreSQL, Redis and two workers: each job once, also when one of the two is killed."""

import signal

from sqlalchemy import func, select

from store.models import Attempt, Model
from tests.faults.fleet import Fleet

JOB = {"rows": 64, "n_epochs": 6}


def test_four_jobs_are_each_done_once_although_a_worker_is_killed(production: Fleet) -> None:
    service = production.service
    production.keep(2)
    jobs = [service.submit(**JOB) for _ in range(4)]
    service.wait_for_checkpoint(jobs[0])
    victim = production.holder(jobs[0])
    victim.send(signal.SIGKILL)
    victim.process.wait()
    for job_id in jobs:
        assert service.wait_for_end(job_id).status == "succeeded"

    assert len({service.tensors(job_id) for job_id in jobs}) == 1
    assert len({tuple(service.losses(job_id)) for job_id in jobs}) == 1
    assert sorted(service.job(job_id).attempt for job_id in jobs) == [1, 1, 1, 2]
    with service.write() as session:
        assert session.scalar(select(func.count()).select_from(Model)) == 4
        assert session.scalar(select(func.count()).select_from(Attempt)) == 5
