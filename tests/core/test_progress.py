"""How a run is driven."""

from collections.abc import Generator
from contextlib import closing
from pathlib import Path

from olora_core.progress import Phase, Saved, Step, drive, result_of


def step(number: int) -> Step:
    return Step(number, 3, number / 3, 1.0, 0.5, 8, 8, 1e-3, 1.0, 0.1, 0)


def run(received: list[str | None]) -> Generator[Phase | Step | Saved, str | None, None]:
    """Yields as `train` does: a plain iterator's updates, then steps that take an answer."""
    try:
        yield from iter([Phase("loading", 0, 1), Phase("loading", 1, 1)])
        for number in (1, 2, 3):
            received.append((yield step(number)))
            if received[-1] == "save":
                yield Saved(number, Path("folder"), {})
    finally:
        received.append("closed")


def test_a_stop_request_is_asked_for_after_each_step_alone() -> None:
    received: list[str | None] = []
    requests = iter([None, "save", None])
    updates = [type(update).__name__ for update in drive(run(received), lambda: next(requests))]
    assert updates == ["Phase", "Phase", "Step", "Step", "Saved", "Step"]
    assert received == [None, "save", None, "closed"]


def test_leaving_the_updates_closes_the_run() -> None:
    received: list[str | None] = []
    with closing(drive(run(received), lambda: None)) as updates:
        for update in updates:
            if isinstance(update, Step):
                break
        assert received == []
    assert received == ["closed"]


def test_the_result_of_a_generator_needs_no_loop() -> None:
    def work() -> Generator[int, None, str]:
        yield 1
        yield 2
        return "done"

    assert result_of(work()) == "done"
