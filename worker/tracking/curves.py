"""A run's curves: the charted numbers of its steps, and their TensorBoard event file.

Files are written with TensorBoard's own record writer, which loads neither TensorFlow nor torch.
"""

import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

Curves = dict[str, float]
CHARTS = {
    "train_loss": "train/loss",
    "train_mean_token_accuracy": "train/accuracy",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/gradient_norm",
    "reward_margin": "train/reward_margin",
    "valid_loss": "valid/loss",
    "valid_mean_token_accuracy": "valid/accuracy",
    "full_valid_loss": "valid/full_loss",
    "full_valid_mean_token_accuracy": "valid/full_accuracy",
}
"""The numbers of a step by their names in its row, and their charts."""
SPEED = "train/tokens_per_second"
EVENTS = "events.out.tfevents"
VERSION = "brain.Event:2"
"""The first record of every event file."""


def curves(values: Mapping[str, Any]) -> Curves:
    """The points of a step's row, by chart. Numbers that are not finite (null in a row) are left out."""
    points = {chart: values[name] for name, chart in CHARTS.items() if values.get(name) is not None}
    if values.get("tokens") and values.get("seconds"):
        points[SPEED] = values["tokens"] / values["seconds"]
    return {chart: float(number) for chart, number in points.items() if math.isfinite(number)}


def event_file_name(run: str, started: float) -> str:
    """The name that TensorBoard looks for. `started`, in unix seconds, orders the files of a folder."""
    return f"{EVENTS}.{int(started)}.{run}"


class EventFile:
    """An event file being written. Every step is on the disk when `add` returns."""

    def __init__(self, path: Path, started: float) -> None:
        self._file: BinaryIO = path.open("wb", buffering=0)
        self._records = RecordWriter(self._file)
        self._write(Event(wall_time=started, file_version=VERSION))

    def __enter__(self) -> "EventFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, step: int, points: Curves, moment: float) -> None:
        """`moment`: unix seconds."""
        if points:
            values = [Summary.Value(tag=chart, simple_value=number) for chart, number in points.items()]
            self._write(Event(wall_time=moment, step=step, summary=Summary(value=values)))

    def _write(self, event: Event) -> None:
        self._records.write(event.SerializeToString())


def read_points(path: Path) -> Iterator[tuple[int, Curves, float]]:
    """(step, points, unix seconds) in the order of writing. A truncated record ends the file."""
    for record in RawEventFileLoader(str(path)).Load():
        event = Event.FromString(record)
        points = {value.tag: value.simple_value for value in event.summary.value}
        if points:
            yield event.step, points, event.wall_time


def run_in(folder: Path) -> str | None:
    """The run whose event file is in a folder, from the file's name; None without one."""
    return next((path.name.split(".", 4)[4] for path in sorted(folder.glob(f"{EVENTS}.*.*"))), None)


def go_on(folder: Path, run: str, step: int) -> tuple[EventFile, dict[int, Curves]]:
    """The event file of a run that resumes from `step` (0: starts), and the points that it holds already.

    Points up to that step are kept. Later ones are dropped: their steps will be repeated.
    """
    folder.mkdir(parents=True, exist_ok=True)
    before = sorted(folder.glob(f"{EVENTS}.*.{run}"))
    kept = [point for path in before for point in read_points(path) if point[0] <= step]
    started = time.time()
    aside = folder / "events.part"
    file = EventFile(aside, started)
    held: dict[int, Curves] = {}
    for number, points, moment in kept:
        file.add(number, points, moment)
        held.setdefault(number, {}).update(points)
    path = aside.replace(folder / event_file_name(run, started))
    for earlier in before:
        if earlier != path:
            earlier.unlink()
    return file, held
