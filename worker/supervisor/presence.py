"""A worker's row in the database: it says every few seconds that the worker is there."""

import logging
import os
import platform
import subprocess
import threading
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

from store import workers
from store.session import DATABASE_AWAY, Sessions
from store.workers import WorkerFacts

from ..launch import visible_gpus

logger = logging.getLogger(__name__)
PACKAGES = ("olora", "torch", "transformers")


class Presence(threading.Thread):
    """Writes the row at once, whenever `job_id` is set, and every few seconds; `stop` removes it."""

    def __init__(self, facts: WorkerFacts, write: Sessions) -> None:
        super().__init__(name="presence", daemon=True)
        self._facts = facts
        self._write = write
        self._job_id: str | None = None
        self._changed = threading.Event()
        self._stopping = False

    def works_on(self, job_id: str | None) -> None:
        """The job that the worker has begun; None: it has none."""
        self._job_id = job_id
        self._changed.set()

    def stop(self) -> None:
        self._stopping = True
        self._changed.set()
        if self.is_alive():
            self.join()

    def run(self) -> None:
        while not self._stopping:
            self._changed.clear()
            self._try(lambda: self._report(self._job_id))
            self._changed.wait(workers.REPORT_SECONDS)
        self._try(self._leave)

    def _report(self, job_id: str | None) -> None:
        with self._write.begin() as session:
            workers.report(session, self._facts, job_id)

    def _leave(self) -> None:
        with self._write.begin() as session:
            workers.leave(session, self._facts.id)

    def _try(self, change: Callable[[], None]) -> None:
        try:
            change()
        except DATABASE_AWAY as error:
            logger.warning("The worker's row could not be written: %s", error.orig)


def describe(worker_id: str) -> WorkerFacts:
    """What this machine has for a worker to train on."""
    device, memory = _gpus() or _cpu()
    return WorkerFacts(worker_id, platform.node()[:255], device[:255], memory, _versions())


def _gpus() -> tuple[str, int | None] | None:
    """The names of the worker's GPUs, and their memory; None without any."""
    chosen = visible_gpus()
    if not chosen:
        return None
    query = ["nvidia-smi", "--query-gpu=index,uuid,name,memory.total", "--format=csv,noheader,nounits"]
    try:
        listing = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
        rows = [[cell.strip() for cell in line.split(",")] for line in listing.splitlines()]
        own = [row for row in rows if row[0] in chosen or row[1] in chosen]
        memory = sum(int(row[3]) for row in own) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        own, memory = [], 0
    if len(own) != len(chosen):  # parts of a divided GPU are not in this list
        return ", ".join(chosen), None
    return ", ".join(row[2] for row in own), memory


def _cpu() -> tuple[str, int | None]:
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"CPU, {cores} cores", memory


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
