"""Sends a run's rows to an experiment tracker, in a thread of its own.

A tracker that is slow, unreachable or misconfigured never delays, fails or blocks a job. It catches up later:
it reports the last step it has, and the rows hold the rest. `FINISH_SECONDS` after the work has stopped, the
follower gives up.
"""

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from sqlalchemy import select
from sqlalchemy.orm import Session

from store import progress
from store.claims import Claim
from store.errors import BadIntegration
from store.integrations import Integration, read_integrations, require_offered
from store.jobs import leaves_model
from store.models import File, Job
from store.session import DATABASE_AWAY, Sessions
from store.settings import Settings
from store.statuses import ENDED

from ..scratch import scratch_folder
from .curves import curves
from .tracker_process import TrackerError, TrackerProcess, tracker_environment
from .trackers import Row, TrackedRun

logger = logging.getLogger(__name__)
POLL_SECONDS = 2.0
PATIENCE_SECONDS = 60.0
"""A client that has not answered by then is killed."""
FINISH_SECONDS = 20.0
LONGEST_PAUSE_SECONDS = 300.0
ROWS_AT_ONCE = 50


@dataclass(frozen=True)
class RunUpdate:
    """What is new in a run: its `rows`, and how it ended, once it has."""

    config: dict[str, Any]
    rows: list[Row]
    status: str | None = None
    """"succeeded", "failed" or "cancelled"; None until it has ended."""
    summary: dict[str, Any] = field(default_factory=dict)


class Source(Protocol):
    def update(self, after: int) -> RunUpdate | None:
        """What is new after step `after`; None when another attempt has the run."""


class JobSource:
    """A job's rows, while this attempt has the job."""

    def __init__(self, claim: Claim, *, read: Sessions, write: Sessions) -> None:
        self.claim = claim
        self.read, self.write = read, write
        self._config: dict[str, Any] = {}

    def update(self, after: int) -> RunUpdate | None:
        mine = select(Job).where(Job.id == self.claim.job_id, Job.attempt == self.claim.attempt)
        try:
            with self.read.begin() as session:
                job = session.scalar(mine)
                return None if job is None else self._update(session, job, after)
        except DATABASE_AWAY as error:
            logger.warning("The database does not answer: %s", error.orig)
            return RunUpdate(self._config, [])

    def _update(self, session: Session, job: Job, after: int) -> RunUpdate:
        spec = job.resolved or (job.spec if job.status in ENDED else {})
        self._config = {"job": job.id, "training_file": job.training_file, **spec}
        rows = [(row.step, curves(row.values)) for row in progress.step_rows(session, job.id, after=after)]
        if job.status not in ENDED:
            return RunUpdate(self._config, rows)
        return RunUpdate(self._config, rows, job.status, self._summary(session, job))

    def _summary(self, session: Session, job: Job) -> dict[str, Any]:
        weights = select(File.sha256).where(File.id.in_(job.result_files[1:2]))
        return {
            "fine_tuned_model": job.fine_tuned_model,
            "trained_tokens": job.trained_tokens,
            "certificate": job.certificate,
            "model_sha256" if leaves_model(job) else "adapter_sha256": session.scalar(weights),
            "error": job.error,
        }

    def warn(self, tracker: str, message: str) -> None:
        try:
            with self.write.begin() as session:
                progress.warn_once(session, self.claim, message, about=tracker)
        except DATABASE_AWAY as error:
            logger.warning("The database does not answer: %s", error.orig)


def follow(claim: Claim, *, settings: Settings, read: Sessions, write: Sessions) -> list["Follower"]:
    """Starts a follower for each tracker that the job names."""
    source = JobSource(claim, read=read, write=write)
    try:
        integrations = read_integrations(claim.integrations)
    except BadIntegration as error:  # from a newer version of the API
        logger.warning(
            "Job %s names trackers that this worker does not know: %s", claim.job_id, error.message
        )
        return []
    return [
        Follower(
            integration,
            run=run,
            name=f"{run}-{claim.attempt}-{integration.type}",
            source=source,
            settings=settings,
            warn=partial(source.warn, integration.title),
        )
        for integration, run in with_runs(integrations, claim.job_id)
    ]


def with_runs(integrations: Iterable[Integration], run: str) -> Iterator[tuple[Integration, str]]:
    """Each integration with its run's id, which has a number from the second one of a type on."""
    kinds: Counter[str] = Counter()
    for integration in integrations:
        kinds[integration.type] += 1
        count = kinds[integration.type]
        yield integration, run if count == 1 else f"{run}-{count}"


class Follower:
    """Keeps one tracker up to date with one run, from its creation until after `stop`."""

    def __init__(
        self,
        integration: Integration,
        *,
        run: str,
        name: str,
        source: Source,
        settings: Settings,
        warn: Callable[[str], None],
    ) -> None:
        self.integration = integration
        self.source = source
        self.settings = settings
        self.run, self.name = run, name
        self._warn = warn
        self._warned = False
        self._stopped = threading.Event()
        self._deadline: float | None = None
        # Not a daemon: a worker that ends waits for it, for FINISH_SECONDS at most.
        self._thread = threading.Thread(target=self._follow, name=f"follow {integration.type}")
        self._thread.start()

    def stop(self, *, hurry: bool = False) -> None:
        """The work has stopped: sends the remaining rows, or with `hurry` drops them. Does not wait."""
        self._deadline = time.monotonic() + (0 if hurry else FINISH_SECONDS)
        self._stopped.set()

    def join(self) -> None:
        """Waits until the tracker has everything, or the follower has given up."""
        self._thread.join()

    # --- the thread ------------------------------------------------------------------------------------

    def _follow(self) -> None:
        pause = 1.0
        while True:
            try:
                with scratch_folder(self.settings.scratch_folder, self.name) as folder:
                    self._send_all(folder)
                return
            except TrackerError as error:
                self._report(str(error))
            except Exception:
                logger.exception("Following run %s for %s failed.", self.run, self.integration.title)
                self._report("an unexpected error occurred; the worker's log has the details")
            self._stopped.wait(pause)
            if self._deadline is not None and time.monotonic() + 1 > self._deadline:
                return
            pause = min(LONGEST_PAUSE_SECONDS, 2 * pause)

    def _report(self, reason: str) -> None:
        logger.warning("%s is not receiving run %s: %s.", self.integration.title, self.run, reason)
        if not self._warned:
            self._warned = True
            self._warn(
                f"{self.integration.title} is not receiving this job's metrics: {reason}. "
                "The job itself continues."
            )

    def _send_all(self, folder: Path) -> None:
        """Sends everything until the run has ended, or this attempt at it. Raises TrackerError."""
        try:
            require_offered([self.integration], self.settings)
        except BadIntegration:
            raise TrackerError("it is not configured on the worker; ask its operator") from None
        kind = self.integration.type
        options = self.integration.model_dump()[kind]
        run = TrackedRun(
            options, self.run, kept_folder=str(self.settings.trackers_folder), scratch_folder=str(folder)
        )
        environment = tracker_environment(kind, os.environ, self.settings, folder)
        with TrackerProcess(kind, environment, self._keeps_waiting) as process:
            step = process.ask(begin=asdict(run))["step"]
            self._send_from(step, process)

    def _send_from(self, step: int, process: TrackerProcess) -> None:
        config: dict[str, Any] | None = None
        while True:
            stopped = self._stopped.is_set()  # read before the rows: once set, no more are written
            update = self.source.update(step)
            if update is None:
                return
            if update.config != config:
                config = update.config
                process.ask(config=config)
            # The newest step may still get its evaluation, which is recorded before the next step.
            rows = update.rows if update.status else update.rows[:-1]
            for start in range(0, len(rows), ROWS_AT_ONCE):
                batch = rows[start : start + ROWS_AT_ONCE]
                process.ask(rows=batch)
                step = batch[-1][0]
            if update.status:
                process.ask(end={"status": update.status, "summary": update.summary})
                return
            if stopped:
                process.ask(leave={})
                return
            self._stopped.wait(POLL_SECONDS)

    def _keeps_waiting(self, asked_at: float) -> bool:
        """Whether to keep waiting for an answer."""
        now = time.monotonic()
        return now < (asked_at + PATIENCE_SECONDS if self._deadline is None else self._deadline)
