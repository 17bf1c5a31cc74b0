"""TensorBoard's event files, read back with TensorBoard's own reader."""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import select
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from store.models import File, Metric
from tests.rows import chat_file
from tests.services import wait_until
from tests.worker.service import Service
from tests.worker.test_supervisor import at_work, trainer_pid
from worker.supervisor.supervisor import Supervisor
from worker.tracking.curves import EventFile, curves, event_file_name, go_on, read_points, run_in

ROOT = Path(__file__).resolve().parents[2]


def charts(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, number) of each chart, as TensorBoard shows them."""
    read = EventAccumulator(str(folder))
    read.Reload()
    return {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def charts_of(service: Service, job_id: str, folder: Path) -> dict[str, list[tuple[int, float]]]:
    with service.write() as session:
        name = session.scalars(
            select(File.filename).where(File.id == service.job(job_id).result_files[2])
        ).one()
    (folder / name).write_bytes(service.result(job_id, 2))
    return charts(folder)


def rows_of(service: Service, job_id: str) -> dict[int, dict[str, float]]:
    with service.write() as session:
        rows = session.scalars(select(Metric).where(Metric.job_id == job_id).order_by(Metric.step))
        return {row.step: row.values for row in rows}


def test_a_job_leaves_an_event_file_of_all_its_steps(
    service: Service, supervisor: Supervisor, tmp_path: Path
) -> None:
    job_id = service.queue(rows=32, validation=chat_file(10, first=100))
    supervisor.run_until_idle()
    rows, shown = rows_of(service, job_id), charts_of(service, job_id, tmp_path)
    assert len(rows) == 16
    for name, chart in (
        ("train_loss", "train/loss"),
        ("train_mean_token_accuracy", "train/accuracy"),
        ("learning_rate", "train/learning_rate"),
        ("grad_norm", "train/gradient_norm"),
        ("full_valid_loss", "valid/full_loss"),
    ):
        expected = [(step, values[name]) for step, values in rows.items() if name in values]
        assert shown[chart] == [(step, pytest.approx(number, rel=1e-6)) for step, number in expected]
    assert [step for step, _ in shown["valid/full_loss"]] == [8, 16]
    speeds = [(step, pytest.approx(v["tokens"] / v["seconds"], rel=1e-6)) for step, v in rows.items()]
    assert shown["train/tokens_per_second"] == speeds


def test_after_a_crash_the_event_file_holds_each_step_once(
    service: Service, supervisor: Supervisor, tmp_path: Path
) -> None:
    job_id = service.queue(rows=64, n_epochs=24)
    with at_work(supervisor, until=lambda: service.job(job_id).status == "succeeded"):
        service.wait_for_checkpoint(job_id)
        wait_until(lambda: service.job(job_id).step > service.checkpoints(job_id)[0].step, "a lost step")
        os.kill(trainer_pid(supervisor), signal.SIGKILL)
        assert service.wait_for_end(job_id).attempt == 2
    steps = [step for step, _ in charts_of(service, job_id, tmp_path)["train/loss"]]
    assert steps == list(range(1, 385))


def test_what_is_not_a_number_is_no_point() -> None:
    assert curves({"step": 1, "train_loss": None, "grad_norm": 2.0, "valid_loss": math.nan}) == {
        "train/gradient_norm": 2.0
    }
    assert curves({"tokens": 100, "seconds": 0.5, "epoch": 1.0}) == {"train/tokens_per_second": 200.0}


def test_a_file_that_goes_on_forgets_what_will_be_done_again(tmp_path: Path) -> None:
    """The process died while it wrote: the last record is cut short."""
    with EventFile(tmp_path / event_file_name("run", 5.0), 5.0) as file:
        for step in range(1, 6):
            file.add(step, {"train/loss": 1 / step}, 5.0 + step)
    [path] = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-3])
    assert [step for step, _, _ in read_points(path)] == [1, 2, 3, 4]

    assert run_in(tmp_path) == "run"
    file, held = go_on(tmp_path, "run", 2)
    assert held == {1: {"train/loss": 1.0}, 2: {"train/loss": 0.5}}
    with file:
        file.add(3, {"train/loss": 30.0}, 20.0)
    assert [path.name.startswith("events.out.tfevents.") for path in tmp_path.iterdir()] == [True]
    assert charts(tmp_path) == {"train/loss": [(1, 1.0), (2, 0.5), (3, 30.0)]}
    file, held = go_on(tmp_path, "run", 0)
    with file:
        assert (charts(tmp_path), held) == ({}, {})
    assert run_in(tmp_path / "elsewhere") is None


def test_writing_it_loads_neither_torch_nor_tensorflow(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib, worker.supervisor.supervisor; from worker.tracking.curves import EventFile\n"
        "with EventFile(pathlib.Path(sys.argv[1]), 1.0) as file: file.add(1, {'a': 1.0}, 2.0)\n"
        "print(*sorted({'torch', 'tensorflow', 'grpc'} & sys.modules.keys()))"
    )
    command = [sys.executable, "-W", "error", "-c", code, str(tmp_path / "events")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
