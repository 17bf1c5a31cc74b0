"""What a bar shows of a job in the service, between its events."""

import io
from typing import Any

import pytest
from rich.console import Console

from cli.progress import ComparisonBars, LiveBars, TrainingBar


def shown(bar: LiveBars) -> str:
    """The last line of the bars."""
    out = io.StringIO()
    Console(file=out, width=100).print(bar._progress.get_renderable())
    return out.getvalue().rstrip().splitlines()[-1]


def job(status: str, stage: str | None = None, done: int = 0, total: int = 1) -> dict[str, Any]:
    named = None if stage is None else {"name": stage, "done": done, "total": total}
    return {"status": status, "olora": {"stage": named}, "progress": {"run": None}}


@pytest.mark.parametrize("kind", [TrainingBar, ComparisonBars])
def test_a_bar_shows_the_stage_of_a_running_job_and_else_its_status(kind: type[LiveBars]) -> None:
    bar = kind(Console(file=io.StringIO()))
    bar.show_progress(job("queued"))
    assert shown(bar).startswith("queued")
    bar.show_progress(job("running", "loading"))
    assert shown(bar).startswith("loading")
    bar.show_progress(job("running", "certifying", 2, 5))
    assert shown(bar).startswith("certifying")
    assert "2/5" in shown(bar)
    bar.show_progress(job("paused", "training", 3, 9))
    assert shown(bar).startswith("paused")


def test_a_bar_of_steps_stays_while_the_job_trains() -> None:
    bar = TrainingBar(Console(file=io.StringIO()))
    bar.step(3, 9, loss=1.5)
    bar.show_progress(job("running", "training", 3, 9))
    assert shown(bar).startswith("training")
    assert "3/9" in shown(bar)
    assert "loss 1.500" in shown(bar)
