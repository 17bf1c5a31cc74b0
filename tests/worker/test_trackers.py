"""Trackers get what the rows hold, through their own clients, offline; none of them affects a job."""

import hashlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from store.models import Job
from store.settings import Settings, read_settings
from tests.rows import chat_file
from tests.services import wait_until
from tests.worker.service import Service
from tests.worker.test_supervisor import at_work, trainer_pid
from worker.supervisor.supervisor import Supervisor
from worker.supervisor.trainer_process import trainer_environment
from worker.tracking import follower
from worker.tracking.tracker_process import TrackerProcess, tracker_environment

WANDB: dict[str, Any] = {
    "type": "wandb",
    "wandb": {"project": "tuning", "entity": None, "name": None, "tags": ["small"]},
}
MLFLOW = {
    "type": "mlflow",
    "mlflow": {"experiment": "tuning", "run_name": "first", "tags": {"team": "search"}},
}
ROOT = Path(__file__).resolve().parents[2]
KEY = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def with_settings(supervisor: Supervisor, **values: Any) -> Iterator[Settings]:
    before = supervisor.settings
    supervisor.settings = before.model_copy(update=values)
    try:
        yield supervisor.settings
    finally:
        supervisor.settings = before


@contextmanager
def silent_server() -> Iterator[tuple[int, list[int]]]:
    """A port of this machine that takes connections and never answers, and a list that grows with each."""
    came: list[int] = []
    kept: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def accept() -> None:
            while True:
                try:
                    kept.append(listening.accept()[0])
                except OSError:
                    return
                came.append(1)

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield listening.getsockname()[1], came
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()
    for connection in kept:
        connection.close()


@contextmanager
def dials() -> Iterator[list[int]]:
    """Grows with every connection that a client opens to the world: all of them would go by this proxy."""
    with silent_server() as (port, came), pytest.MonkeyPatch.context() as patch:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            patch.setenv(name, f"http://127.0.0.1:{port}")
            patch.setenv(name.lower(), f"http://127.0.0.1:{port}")
        yield came


def following() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("follow ")]


def settled() -> None:
    """All followers have ended, and so have the processes of their clients."""
    for thread in following():
        thread.join(60)
        assert not thread.is_alive()


def inspected(run_folder: Path, *options: str) -> list[dict[str, Any]]:
    """What Weights & Biases' own reader finds in an offline run."""
    [log] = run_folder.glob("run-*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", *options, str(log)]
    environ = {**os.environ, "WANDB_ERROR_REPORTING": "false", "WANDB_MODE": "offline"}
    text = subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stdout
    return [json.loads(text)] if options else [json.loads(line) for line in text.splitlines()]


def wandb_losses(folder: Path) -> list[tuple[int, float]]:
    items = [record["history"]["item"] for record in inspected(folder) if record["type"] == "history"]
    return [(item["_step"], item["train/loss"]) for item in items]


def wandb_runs(settings: Settings, job_id: str) -> list[Path]:
    return list((settings.trackers_folder / "wandb").glob(f"offline-run-*-{job_id}"))


MLFLOW_STORES = "ignore::sqlalchemy.exc.SADeprecationWarning"
"""MLflow's own, of the release of SQLAlchemy that is pinned here."""


def mlflow_runs(uri: str, job_id: str) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments)
    return [(client, run) for run in runs if run.data.tags["olora.run"] == job_id]


def mlflow_losses(client: Any, run: Any) -> list[tuple[int, float]]:
    return [
        (metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, "train/loss")
    ]


@pytest.fixture(scope="module")
def mlflow_uri(service: Service) -> str:
    return f"sqlite:///{service.settings.home / 'mlflow.db'}"


@dataclass
class Tracked:
    """A job that was sent to both trackers, and how many connections were opened for it."""

    job: Job
    settings: Settings
    connections: int


@pytest.fixture(scope="module")
def tracked(service: Service, supervisor: Supervisor, mlflow_uri: str) -> Tracked:
    account = {"wandb_mode": "offline", "wandb_api_key": SecretStr(KEY), "mlflow_tracking_uri": mlflow_uri}
    with with_settings(supervisor, **account) as settings, dials() as came:
        second = {**WANDB, "wandb": {**WANDB["wandb"], "project": "other"}}
        trackers = [WANDB, MLFLOW, second]
        job_id = service.queue(rows=32, validation=chat_file(10, first=100), integrations=trackers)
        supervisor.run_until_idle()
        settled()
    job = service.job(job_id)
    assert job.status == "succeeded"
    assert service.warnings(job_id) == []
    return Tracked(job, settings, len(came))


def test_an_offline_run_of_wandb_holds_the_whole_job(service: Service, tracked: Tracked) -> None:
    job = tracked.job
    [folder] = wandb_runs(tracked.settings, job.id)
    assert wandb_losses(folder) == list(enumerate(service.losses(job.id), 1))
    [run] = inspected(folder, "--summary")
    assert (run["run_id"], run["name"], run["project"], run["tags"]) == (job.id, job.id, "tuning", ["small"])
    assert (run["state"], run["exit_code"], run["summary"]["status"]) == ("finished", 0, "succeeded")
    assert job.resolved is not None
    assert run["config"]["hyperparameters"] == job.resolved["hyperparameters"]
    assert run["config"]["adapter"]["method"] == "olora"
    assert run["summary"]["adapter_sha256"] == hashlib.sha256(service.result(job.id, 1)).hexdigest()
    assert job.certificate is not None
    assert run["summary"]["certificate"] == job.certificate
    assert run["summary"]["valid/full_loss"] == pytest.approx(job.certificate["valid_loss_after"])


def test_a_job_may_have_a_run_in_each_of_two_projects(service: Service, tracked: Tracked) -> None:
    [folder] = wandb_runs(tracked.settings, f"{tracked.job.id}-2")
    assert wandb_losses(folder) == list(enumerate(service.losses(tracked.job.id), 1))
    assert inspected(folder, "--summary")[0]["project"] == "other"


@pytest.mark.filterwarnings(MLFLOW_STORES)
def test_the_hash_of_a_merged_model_is_sent_as_a_models(
    service: Service, supervisor: Supervisor, mlflow_uri: str
) -> None:
    with with_settings(supervisor, mlflow_tracking_uri=mlflow_uri):
        job_id = service.queue(rows=16, max_steps=1, adapter={"export": "merged"}, integrations=[MLFLOW])
        supervisor.run_until_idle()
        settled()
    [(_, run)] = mlflow_runs(mlflow_uri, job_id)
    assert run.data.tags["olora.model_sha256"] == hashlib.sha256(service.result(job_id, 1)).hexdigest()
    assert run.data.tags["olora.certificate/as_written/dtype"] == "float32"
    assert "olora.adapter_sha256" not in run.data.tags


@pytest.mark.filterwarnings(MLFLOW_STORES)
def test_mlflow_holds_the_whole_job(service: Service, tracked: Tracked, mlflow_uri: str) -> None:
    job = tracked.job
    [(client, run)] = mlflow_runs(mlflow_uri, job.id)
    assert mlflow_losses(client, run) == list(enumerate(service.losses(job.id), 1))
    assert (run.info.run_name, run.info.status, run.data.tags["team"]) == ("first", "FINISHED", "search")
    assert client.get_experiment(run.info.experiment_id).name == "tuning"
    assert job.resolved is not None
    rate = job.resolved["hyperparameters"]["learning_rate"]
    assert run.data.params["hyperparameters.learning_rate"] == str(rate)
    assert run.data.params["adapter.method"] == "olora"
    assert run.data.tags["olora.adapter_sha256"] == hashlib.sha256(service.result(job.id, 1)).hexdigest()
    assert run.data.tags["olora.fine_tuned_model"] == job.fine_tuned_model
    assert run.data.tags["olora.certificate/passed"] == "True"
    assert job.certificate is not None
    assert run.data.metrics["certificate/bound"] == job.certificate["bound"]
    assert run.data.metrics["valid/full_loss"] == pytest.approx(job.certificate["valid_loss_after"])


def test_offline_no_client_opens_a_connection_and_no_key_is_left(service: Service, tracked: Tracked) -> None:
    assert tracked.connections == 0
    assert not any(KEY.encode() in path.read_bytes() for path in files_of(service))


def files_of(service: Service) -> list[Path]:
    return [path for path in service.settings.home.rglob("*") if path.is_file()]


@pytest.mark.filterwarnings(MLFLOW_STORES)
def test_a_job_that_resumes_resumes_the_same_run(
    service: Service, supervisor: Supervisor, mlflow_uri: str
) -> None:
    """Killed after steps that no checkpoint holds, which are repeated; each is sent once."""
    with with_settings(supervisor, wandb_mode="offline", mlflow_tracking_uri=mlflow_uri) as settings:
        job_id = service.queue(rows=64, n_epochs=24, integrations=[WANDB, MLFLOW])
        with at_work(supervisor, until=lambda: service.job(job_id).status == "succeeded"):
            service.wait_for_checkpoint(job_id)
            wait_until(lambda: mlflow_runs(mlflow_uri, job_id), "a first run")
            wait_until(lambda: mlflow_losses(*mlflow_runs(mlflow_uri, job_id)[0]), "its first steps")
            os.kill(trainer_pid(supervisor), signal.SIGKILL)
            assert service.wait_for_end(job_id).attempt == 2
        settled()
    expected = list(enumerate(service.losses(job_id), 1))
    assert len(expected) == 384
    [folder] = wandb_runs(settings, job_id)
    assert wandb_losses(folder) == expected
    [(client, run)] = mlflow_runs(mlflow_uri, job_id)
    assert mlflow_losses(client, run) == expected
    assert run.info.status == "FINISHED"
    [warning] = service.warnings(job_id)
    assert "was killed" in warning


@pytest.mark.filterwarnings(MLFLOW_STORES)
def test_a_job_that_fails_or_is_cancelled_ends_its_run(
    service: Service, supervisor: Supervisor, mlflow_uri: str
) -> None:
    with with_settings(supervisor, mlflow_tracking_uri=mlflow_uri):
        failed = service.queue(context_length=16, integrations=[MLFLOW])
        supervisor.run_until_idle()
        cancelled = service.queue(rows=64, n_epochs=40, integrations=[MLFLOW])
        with at_work(supervisor):
            service.wait_for_step(cancelled, 1)
            service.cancel(cancelled)
            service.wait_for_end(cancelled)
        settled()
    [(_, run)] = mlflow_runs(mlflow_uri, failed)
    assert run.info.status == "FAILED"
    error = service.job(failed).error
    assert error is not None
    assert run.data.tags["olora.error/message"] == error["message"]
    [(client, run)] = mlflow_runs(mlflow_uri, cancelled)
    assert run.info.status == "KILLED"
    assert mlflow_losses(client, run) == list(enumerate(service.losses(cancelled), 1))


def test_a_tracker_that_does_not_answer_does_not_affect_the_job(
    service: Service,
    supervisor: Supervisor,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Two of them: one takes connections and is silent, the other refuses them. Both have secrets."""
    monkeypatch.setattr(follower, "FINISH_SECONDS", 8.0)
    caplog.set_level(logging.DEBUG)
    with silent_server() as (port, came), socket.create_server(("127.0.0.1", 0)) as closing:
        closed = closing.getsockname()[1]
        closing.close()
        secrets = {
            "wandb_api_key": SecretStr(KEY),
            "wandb_base_url": f"http://localhost:{port}",
            "mlflow_tracking_uri": f"http://canary-user:canary-word@localhost:{closed}/canary-path",
            "mlflow_token": SecretStr("canary-token"),
        }
        with with_settings(supervisor, **secrets):
            job_id = service.queue(rows=32, integrations=[WANDB, MLFLOW])
            supervisor.run_until_idle()
            assert service.job(job_id).status == "succeeded"
            assert len(following()) == 2  # nobody has waited for them
            settled()
        assert came
    first, second = sorted(service.warnings(job_id))
    assert first.startswith(
        "MLflow is not receiving this job's metrics: it cannot be reached or refuses the run"
    )
    assert second.startswith(
        "Weights & Biases is not receiving this job's metrics: its client did not answer"
    )
    for canary in (KEY, "canary", "localhost"):
        assert canary not in caplog.text
        assert canary not in service.traces(job_id) + first + second
        assert not any(canary.encode() in path.read_bytes() for path in files_of(service))


def test_a_tracker_that_comes_back_gets_what_it_missed(
    service: Service, supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its client was killed in the middle."""
    begun: list[TrackerProcess] = []

    class Watched(TrackerProcess):
        def ask(self, **message: Any) -> dict[str, Any]:
            answer = super().ask(**message)
            if "rows" in message and not begun:
                begun.append(self)
                os.kill(self.pid, signal.SIGKILL)
            return answer

    monkeypatch.setattr(follower, "TrackerProcess", Watched)
    with with_settings(supervisor, wandb_mode="offline") as settings:
        job_id = service.queue(rows=64, n_epochs=4, integrations=[WANDB])
        supervisor.run_until_idle()
        settled()
    assert begun
    [folder] = wandb_runs(settings, job_id)
    assert wandb_losses(folder) == list(enumerate(service.losses(job_id), 1))
    [warning] = service.warnings(job_id)
    assert warning == (
        "Weights & Biases is not receiving this job's metrics: its client ended unexpectedly. "
        "The job itself continues."
    )


def test_a_worker_that_cannot_reach_a_tracker_says_why(
    service: Service, supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The API is configured for it and this worker is not, or lacks its client."""
    monkeypatch.setattr(follower, "FINISH_SECONDS", 3.0)
    job_id = service.queue(rows=16, integrations=[MLFLOW])
    supervisor.run_until_idle()
    settled()
    [warning] = service.warnings(job_id)
    assert "it is not configured on the worker" in warning

    (tmp_path / "wandb.py").write_text("raise ImportError('there is no such client')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with with_settings(supervisor, wandb_mode="offline"):
        job_id = service.queue(rows=16, integrations=[WANDB])
        supervisor.run_until_idle()
        settled()
    [warning] = service.warnings(job_id)
    assert "its client is not installed on the worker; ask its operator" in warning


def test_each_process_has_its_own_account_only(tmp_path: Path) -> None:
    settings = read_settings(
        wandb_api_key=KEY,
        wandb_base_url="https://wandb.host",
        mlflow_tracking_uri="https://us%20er:word@mlflow.host/at",
        mlflow_token="token",
    )
    here = {"PATH": "/bin", "OLORA_WANDB_API_KEY": KEY, "WANDB_API_KEY": KEY, "HTTPS_PROXY": "http://proxy"}
    trainer = trainer_environment(here)
    assert KEY not in trainer.values()
    assert "HTTPS_PROXY" not in trainer
    wandb = tracker_environment("wandb", here, settings, tmp_path)
    mlflow = tracker_environment("mlflow", here, settings, tmp_path)
    assert (wandb["WANDB_API_KEY"], wandb["WANDB_BASE_URL"]) == (KEY, "https://wandb.host")
    assert wandb["HTTPS_PROXY"] == mlflow["HTTPS_PROXY"] == "http://proxy"
    assert not any(name.startswith(("MLFLOW", "OLORA")) for name in wandb)
    assert not any(name.startswith(("WANDB", "OLORA")) for name in mlflow)
    account = [mlflow[f"MLFLOW_TRACKING_{name}"] for name in ("URI", "USERNAME", "PASSWORD", "TOKEN")]
    assert account == ["https://mlflow.host/at", "us er", "word", "token"]


def test_the_supervisor_loads_no_client() -> None:
    code = (
        "import sys, worker.supervisor.supervisor\n"
        "print(*sorted({'torch', 'tensorflow', 'wandb', 'mlflow'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
