"""The service without its web front: a dispatcher, and real Celery workers to be killed."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from kombu import Queue

from store.dispatch import Dispatcher
from store.queue import QUEUE, TASK, celery_app
from store.settings import Settings
from tests.services import die_with_parent, wait_until
from tests.worker.service import Service, exists
from worker.launch import worker_command, worker_environment

LEASE_SECONDS = 3.0


SETTINGS = (
    *("home", "database_url", "broker_url", "storage_url", "models_dir"),
    *("lease_seconds", "checkpoint_seconds"),
)


def settings_environment(settings: Settings) -> dict[str, str]:
    """The OLORA_ variables that give another process these settings."""
    return {f"OLORA_{name.upper()}": str(getattr(settings, name)) for name in SETTINGS}


def descendants(pid: int) -> list[int]:
    """Running processes whose parent is this one, or one of its children."""
    children = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(parent) == pid and state != "Z":
                children += [int(entry.name), *descendants(int(entry.name))]
    return children


@dataclass
class Worker:
    """A Celery worker process."""

    process: subprocess.Popen[bytes]
    name: str
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def trainer(self) -> int:
        """The pid of its trainer."""
        [pid] = descendants(self.pid)
        return pid

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)


@dataclass
class Fleet:
    """The workers of one service."""

    service: Service
    folder: Path
    workers: list[Worker] = field(default_factory=list)
    _started: int = 0

    def start(self) -> Worker:
        """A new worker, once it answers."""
        self._started += 1
        name = f"worker-{self._started}"
        log = self.folder / f"{name}.log"
        settings = self.service.settings
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("OLORA_")}
        with log.open("wb") as written:
            process = subprocess.Popen(
                worker_command(settings, name=name),
                env=worker_environment(inherited | settings_environment(settings)),
                stdout=written,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        worker = Worker(process, name, log)
        self.workers.append(worker)
        return worker

    def keep(self, count: int) -> None:
        """Starts workers until `count` of them run."""
        self.workers = [worker for worker in self.workers if worker.process.poll() is None]
        while len(self.workers) < count:
            self.start()

    def holder(self, job_id: str) -> Worker:
        """The worker that has the job."""
        owner = self.service.job(job_id).lease_owner
        assert owner is not None
        return next(worker for worker in self.workers if worker.pid == int(owner.split(":")[1]))

    def ping(self, seconds: float = 3.0) -> set[str]:
        """Names of the workers that answer."""
        with celery_app(self.service.settings) as app:
            answers = app.control.inspect(timeout=seconds).ping() or {}
        return {str(answer).partition("@")[0] for answer in answers}

    def wake(self, times: int) -> None:
        """Sends wake-ups, whatever is queued already."""
        with celery_app(self.service.settings) as app:
            for _ in range(times):
                app.send_task(TASK, queue=QUEUE, ignore_result=True)

    def waiting(self) -> int:
        """Messages that no worker has taken yet."""
        with celery_app(self.service.settings) as app, app.connection_for_write() as connection:
            return int(Queue(QUEUE)(connection.default_channel).queue_declare().message_count)

    def end(self) -> None:
        """Kills the workers, and checks that every process they started ends."""
        started = [pid for worker in self.workers for pid in descendants(worker.pid)]
        for worker in self.workers:
            worker.process.kill()
            worker.process.wait()
        wait_until(lambda: not any(map(exists, started)), "the end of the trainers", seconds=5)


@contextmanager
def fleet_of(settings: Settings, folder: Path) -> Iterator[Fleet]:
    """The service with its dispatcher, and without any worker yet."""
    service = Service(settings)
    dispatcher = Dispatcher(settings, service.engine, tick_seconds=0.2)
    dispatcher.start()
    fleet = Fleet(service, folder)
    yield fleet
    fleet.end()
    dispatcher.stop()
    service.engine.dispose()
