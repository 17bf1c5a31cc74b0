"""Faults in the middle of a comparison, in both columns: the report is the one that it would have been."""

import os
import signal

import pytest

from tests.faults.fleet import Fleet

COMPARISON = {"n_epochs": 4}


@pytest.fixture(params=["embedded", "production"])
def fleet(request: pytest.FixtureRequest) -> Fleet:
    fleet: Fleet = request.getfixturevalue(request.param)
    fleet.keep(1)
    return fleet


def wait_for_another_checkpoint(fleet: Fleet, comparison_id: str, beyond: int = 0) -> int:
    """The step of a checkpoint that lies beyond one, in the first half of the comparison's steps."""
    service = fleet.service

    def newest() -> int:
        return max((checkpoint.step for checkpoint in service.checkpoints(comparison_id)), default=0)

    service.wait(comparison_id, lambda _: newest() > beyond, f"a checkpoint beyond step {beyond}")
    row = service.job(comparison_id)  # read once more: the awaited one is older than the checkpoint
    assert row.status == "running"
    assert row.total_steps
    assert row.step < row.total_steps / 2
    return newest()


def test_a_killed_trainer_and_a_killed_worker_leave_no_trace_in_the_report(fleet: Fleet) -> None:
    service = fleet.service
    uninterrupted = service.submit_comparison(**COMPARISON)
    assert service.wait_for_end(uninterrupted).status == "succeeded"

    comparison_id = service.submit_comparison(**COMPARISON)
    step = wait_for_another_checkpoint(fleet, comparison_id)
    os.kill(fleet.holder(comparison_id).trainer(), signal.SIGKILL)
    wait_for_another_checkpoint(fleet, comparison_id, beyond=step)
    worker = fleet.holder(comparison_id)
    worker.send(signal.SIGKILL)
    worker.process.wait()
    fleet.keep(1)

    row = service.wait_for_end(comparison_id)
    assert (row.status, row.error, row.attempt, row.failures) == ("succeeded", None, 3, 0)
    killed, lost = service.warnings(comparison_id)
    assert "was killed (out of memory?)" in killed
    assert "was lost" in lost
    assert service.report(comparison_id) == service.report(uninterrupted)
    ended = [
        event.data["run"] for event in service.events(comparison_id) if event.type == "run" and event.data
    ]
    assert row.at_run is not None
    assert ended == list(range(1, row.at_run["runs"] + 1))
    results = {key.split("/")[3] for key in service.storage.list(f"jobs/{comparison_id}/results")}
    assert results == {"a3"}
