"""The worker processes of this machine: one per GPU, or per OLORA_DEVICES_PER_WORKER GPUs, or one on the CPU.

A worker that dies is restarted, after a wait that doubles while it keeps dying.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from store.settings import Settings

POLL_SECONDS = 0.2
FIRST_WAIT_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 60.0
SETTLED_SECONDS = 60.0
"""A worker that lived this long gets the first wait again at its next death."""
STOP_GRACE_SECONDS = 120.0
"""From SIGTERM to SIGKILL. A running job needs time to finish a step and save a checkpoint."""
LOG_BYTES = 10 * 2**20

Report = Callable[[str], None]


@dataclass
class Worker:
    """One worker process, and when to restart it after its death."""

    name: str
    gpus: str | None
    process: "subprocess.Popen[bytes] | None" = None
    started_at: float = 0.0
    start_at: float = 0.0
    wait_seconds: float = FIRST_WAIT_SECONDS


class Workers:
    """Starts and restarts the workers in the thread that calls `run`, and stops them when it returns."""

    def __init__(self, settings: "Settings", report: Report, log: Path | None = None) -> None:
        """With `log`, the workers write there instead of to this process's own output."""
        from worker.launch import visible_gpus

        self._settings = settings
        self._report = report
        self._log = log
        gpus, each = visible_gpus(), settings.devices_per_worker
        self.workers = [
            Worker(f"gpu{first}", ",".join(gpus[first : first + each])) for first in range(0, len(gpus), each)
        ] or [Worker("cpu", None)]

    def run(self, should_stop: Callable[[], bool], should_kill: Callable[[], bool] = lambda: False) -> None:
        """Keeps the workers running until `should_stop`; then SIGTERM, and SIGKILL after a grace period."""
        try:
            while not should_stop():
                for worker in self.workers:
                    self._keep_running(worker)
                time.sleep(POLL_SECONDS)
        finally:
            self._stop(should_kill)

    def _keep_running(self, worker: Worker) -> None:
        now = time.monotonic()
        if worker.process is None:
            if now >= worker.start_at:
                self._start(worker)
            return
        code = worker.process.poll()
        if code is None:
            return
        worker.process = None
        if now - worker.started_at > SETTLED_SECONDS:
            worker.wait_seconds = FIRST_WAIT_SECONDS
        worker.start_at = now + worker.wait_seconds
        where = f" (log: {self._log})" if self._log else ""
        self._report(
            f"Worker {worker.name} {_ending(code)}; restarting in {worker.wait_seconds:.0f} s{where}"
        )
        worker.wait_seconds = min(LONGEST_WAIT_SECONDS, 2 * worker.wait_seconds)

    def _start(self, worker: Worker) -> None:
        from worker.launch import worker_command, worker_environment

        worker.started_at = time.monotonic()
        output = self._open_log()
        try:
            # Its own session: Ctrl-C reaches only this process, which then stops the workers with SIGTERM.
            worker.process = subprocess.Popen(
                worker_command(self._settings, name=worker.name),
                env=worker_environment(os.environ, parent=os.getpid(), gpus=worker.gpus),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                start_new_session=True,
            )
        finally:
            if output:
                output.close()

    def _open_log(self) -> IO[bytes] | None:
        from store.home import make_folder

        if self._log is None:
            return None
        make_folder(self._log.parent)
        if self._log.exists() and self._log.stat().st_size > LOG_BYTES:
            os.replace(self._log, self._log.with_suffix(".old.log"))
        return self._log.open("ab")

    def _stop(self, should_kill: Callable[[], bool]) -> None:
        running = [worker.process for worker in self.workers if worker.process is not None]
        for process in running:
            process.send_signal(signal.SIGTERM)
        until = time.monotonic() + STOP_GRACE_SECONDS
        for process in running:
            while process.poll() is None and time.monotonic() < until and not should_kill():
                time.sleep(POLL_SECONDS / 2)
            if process.poll() is None:
                process.kill()
                process.wait()


def _ending(code: int) -> str:
    if code >= 0:
        return f"exited with code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
