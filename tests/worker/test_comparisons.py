"""Comparisons in the worker: as jobs, on the same warm base, to a page and a report."""

import html
import json
import time
from collections.abc import Sequence
from typing import Any

import pytest

from store.events import Event
from tests.worker.service import Service
from tests.worker.test_supervisor import at_work, trainer_pid
from worker.supervisor.supervisor import Supervisor

LONG = {"rows": 64, "n_epochs": 40}
"""Thousands of steps: longer than any test of it."""


def runs(events: Sequence[Event]) -> list[dict[str, Any]]:
    return [event.data or {} for event in events if event.type == "run"]


@pytest.fixture(scope="module")
def compared(service: Service, supervisor: Supervisor) -> str:
    """The id of a comparison that nothing happened to."""
    comparison_id = service.queue_comparison()
    assert supervisor.run_until_idle() == 1
    return comparison_id


def test_a_comparison_becomes_a_page_and_a_report(service: Service, compared: str) -> None:
    row = service.job(compared)
    assert (row.status, row.error, row.attempt, row.failures) == ("succeeded", None, 1, 0)
    assert (row.fine_tuned_model, row.certificate) == (None, None)
    assert row.step == row.total_steps
    page, report = (service.result(compared, position) for position in (0, 1))
    assert page.lstrip().lower().startswith(b"<!doctype html>")
    assert row.findings is not None
    assert row.findings["verdict"]["sentence"] in html.unescape(page.decode())
    assert {method["method"] for method in row.findings["methods"]} == {"olora", "lora"}
    written = json.loads(report)
    assert written["training"]["file"] == row.training_file
    assert written["verdict"]["sentence"] == row.findings["verdict"]["sentence"]
    assert row.findings["winner"]["adapter"]["method"] in ("olora", "lora")
    for method, short in zip(written["methods"], row.findings["methods"], strict=True):
        assert short == {name: method[name] for name in short}
        assert len(short["final"]["losses"]) == 2
    stored = {key.rpartition("/")[0] for key in service.storage.list(f"jobs/{compared}")}
    kept = {checkpoint.storage_key for checkpoint in service.checkpoints(compared)}
    assert stored == {*kept, f"jobs/{compared}/results/a1"}


def test_every_run_is_an_event_and_no_step_is(service: Service, compared: str) -> None:
    row, events = service.job(compared), service.events(compared)
    ended = runs(events)
    assert row.at_run is not None
    assert [run["run"] for run in ended] == list(range(1, row.at_run["runs"] + 1))
    assert row.at_run["run"] == row.at_run["runs"]
    final = [(run["method"], run["seed"]) for run in ended if run["stage"] == "final"]
    assert sorted(final) == [("lora", 7), ("lora", 8), ("olora", 7), ("olora", 8)]
    assert sum(run["steps"] for run in ended) == row.step
    assert {event.type for event in events} == {"message", "run"}
    assert service.losses(compared) == []
    assert events[-1].message == "The comparison has successfully completed"


def test_the_base_stays_warm_and_untouched_between_jobs_and_comparisons(
    service: Service, supervisor: Supervisor, compared: str
) -> None:
    """The adapters of the jobs before and after are the same, and so are the comparisons around them."""
    warm = trainer_pid(supervisor)
    before, between, after = service.queue(), service.queue_comparison(), service.queue()
    assert supervisor.run_until_idle() == 3
    assert trainer_pid(supervisor) == warm
    assert service.tensors(before) == service.tensors(after)
    assert service.report(between) == service.report(compared)


def test_a_cancelled_comparison_stops_at_its_next_step(service: Service, supervisor: Supervisor) -> None:
    comparison_id = service.queue_comparison(**LONG)
    with at_work(supervisor):
        service.wait_for_step(comparison_id, 3)
        service.cancel(comparison_id)
        asked = time.monotonic()
        row = service.wait_for_end(comparison_id)
        seconds = time.monotonic() - asked
    assert (row.status, row.error) == ("cancelled", None)
    assert seconds < 5
    assert supervisor.trainer is not None
    assert supervisor.trainer.alive


def test_a_stopping_worker_hands_its_comparison_back_and_another_resumes_it(
    service: Service, supervisor: Supervisor, compared: str
) -> None:
    comparison_id = service.queue_comparison()
    stopping = Supervisor(service.settings)
    with at_work(stopping) as finish:
        service.wait(comparison_id, lambda _: len(runs(service.events(comparison_id))) >= 2, "two runs")
        stopping.stop()
        finish()
    stopping.close()
    row = service.job(comparison_id)
    assert (row.status, row.attempt, row.failures) == ("queued", 1, 0)
    assert service.checkpoints(comparison_id)[0].step == row.step
    supervisor.run_until_idle()
    row = service.job(comparison_id)
    assert (row.status, row.attempt, row.failures) == ("succeeded", 2, 0)
    assert service.warnings(comparison_id) == []
    assert service.report(comparison_id) == service.report(compared)
    numbers = [run["run"] for run in runs(service.events(comparison_id))]
    assert numbers == sorted(set(numbers)), "each once, in order"


def test_a_comparison_is_paused_when_its_time_is_used_up_and_goes_on_to_the_same_report(
    service: Service, supervisor: Supervisor, compared: str
) -> None:
    comparison_id = service.queue_comparison(options={"max_seconds": 1})
    supervisor.run_until_idle()
    row = service.job(comparison_id)
    assert (row.status, row.pause_reason, row.error) == ("paused", "max_seconds", None)
    messages = [event.message for event in service.events(comparison_id)]
    assert sum("The comparison has used its max_seconds = 1." in message for message in messages) == 1
    service.resume(comparison_id, max_seconds=None)
    supervisor.run_until_idle()
    assert service.job(comparison_id).status == "succeeded"
    assert service.warnings(comparison_id) == []
    assert service.report(comparison_id) == service.report(compared)


def test_a_base_model_that_is_gone_fails_the_comparison_with_a_sentence(
    service: Service, supervisor: Supervisor
) -> None:
    comparison_id = service.queue_comparison(model="tini")
    supervisor.run_until_idle()
    row = service.job(comparison_id)
    assert row.error is not None
    assert (row.status, row.error["code"]) == ("failed", "model_not_available")
    assert service.events(comparison_id)[-1].message.startswith("The comparison failed: ")
