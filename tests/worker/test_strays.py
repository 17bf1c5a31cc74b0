"""Stored folders that no row names are removed, and no others."""

from pathlib import Path

import pytest

from store import claims, progress
from tests.worker.service import Service
from worker.supervisor.strays import checkpoint_folder, remove_strays, result_folder


@pytest.fixture
def job_id(service: Service, tmp_path: Path) -> str:
    """A running job with two stored checkpoints of two attempts, and folders that no row names."""
    job_id = service.queue()
    (tmp_path / "state.json").write_text("{}")
    with service.write.begin() as session:
        claim = claims.claim(session, owner="here", lease_seconds=60)
        assert claim is not None
        assert claim.job_id == job_id
        for step, attempt in ((8, 1), (16, 12)):
            progress.add_checkpoint(session, claim, step, {}, checkpoint_folder(job_id, step, attempt, 1))
    for folder in (*named(job_id), *strays(job_id)):
        service.storage.put_folder(folder, tmp_path)
    return job_id


def named(job_id: str) -> set[str]:
    return {checkpoint_folder(job_id, 8, 1, 1), checkpoint_folder(job_id, 16, 12, 1)}


def strays(job_id: str) -> set[str]:
    first = {checkpoint_folder(job_id, 9, 1, 1), checkpoint_folder(job_id, 8, 1, 2), result_folder(job_id, 1)}
    return first | {checkpoint_folder(job_id, 17, 12, 1), checkpoint_folder(job_id, 1, 2, 1)}


def left(service: Service, job_id: str) -> set[str]:
    return {key.rpartition("/")[0] for key in service.storage.list(f"jobs/{job_id}")}


def test_whoever_holds_the_job_removes_all_of_them(service: Service, job_id: str) -> None:
    remove_strays(service.write, service.storage, job_id)
    assert left(service, job_id) == named(job_id)


def test_an_attempt_that_lost_the_job_removes_its_own(service: Service, job_id: str) -> None:
    remove_strays(service.write, service.storage, job_id, attempt=1)
    assert left(service, job_id) == named(job_id) | {
        checkpoint_folder(job_id, 17, 12, 1),
        checkpoint_folder(job_id, 1, 2, 1),
    }
