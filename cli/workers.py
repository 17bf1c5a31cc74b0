"""The worker processes of this machine: one for each GPU (or so many of them), else one; restarted when they
die.
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
"""A worker that lived this long has started well: its next death is waited for from the beginning again."""
STOP_GRACE_SECONDS = 120.0
"""From TERM to KILL. A running job needs a step and a checkpoint to go back to the queue."""
LOG_BYTES = 10 * 2**20

Say = Callable[[str], None]


@dataclass
class Worker:
    """One worker process, and when to start it again once it has died."""

    name: str
    gpus: str | None
    process: "subprocess.Popen[bytes] | None" = None
    started_at: float = 0.0
    start_at: float = 0.0
    wait_seconds: float = FIRST_WAIT_SECONDS


class Workers:
    """Started and watched by the thread that calls `run`, which they do not outlive."""

    def __init__(self, settings: "Settings", say: Say, log: Path | None = None) -> None:
        """With `log`, the workers write there instead of to this process's own output."""
        from worker.launch import visible_gpus

        self._settings = settings
        self._say = say
        self._log = log
        gpus, each = visible_gpus(), settings.devices_per_worker
        self.workers = [
            Worker(f"gpu{first}", ",".join(gpus[first : first + each])) for first in range(0, len(gpus), each)
        ] or [Worker("cpu", None)]

    def run(self, should_stop: Callable[[], bool], should_kill: Callable[[], bool] = lambda: False) -> None:
        """Keeps the workers up until `should_stop`, then ends them: TERM, a grace, KILL."""
        try:
            while not should_stop():
                for worker in self.workers:
                    self._look_after(worker)
                time.sleep(POLL_SECONDS)
        finally:
            self._stop(should_kill)

    def _look_after(self, worker: Worker) -> None:
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
        where = f"; its log: {self._log}" if self._log else ""
        self._say(
            f"Worker {worker.name} {_ending(code)}; it starts again in {worker.wait_seconds:.0f} s{where}"
        )
        worker.wait_seconds = min(LONGEST_WAIT_SECONDS, 2 * worker.wait_seconds)

    def _start(self, worker: Worker) -> None:
        from worker.launch import worker_command, worker_environment

        worker.started_at = time.monotonic()
        output = self._open_log()
        try:
            # Its own session: Ctrl-C reaches this process alone, which then stops the workers in order.
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
        return f"ended with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"
