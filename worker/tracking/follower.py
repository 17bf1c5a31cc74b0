"""Follows a run's rows and has a tracker told of them, in a thread beside whatever does the work.

A tracker that is slow, away or wrongly set up never delays, fails or blocks a job. What it missed it is told
later: it says itself which step it has, and the rows hold the others. After `FINISH_SECONDS` beyond the run's
end nobody waits for it any more.
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
from .tracker_process import TrackerProcess, Trouble, tracker_environment
from .trackers import Order, Row

logger = logging.getLogger(__name__)
POLL_SECONDS = 2.0
PATIENCE_SECONDS = 60.0
"""A client that answers nothing for so long is ended."""
FINISH_SECONDS = 20.0
LONGEST_PAUSE_SECONDS = 300.0
ROWS_AT_ONCE = 50


@dataclass(frozen=True)
class News:
    """What a run has to tell: `rows` beyond those asked for, and its end once it has come."""

    config: dict[str, Any]
    rows: list[Row]
    status: str | None = None
    """"succeeded", "failed" or "cancelled"; None: it has not ended."""
    summary: dict[str, Any] = field(default_factory=dict)


class Source(Protocol):
    def news(self, after: int) -> News | None:
        """What there is beyond step `after`; None when the run is somebody else's now."""


class JobSource:
    """A job's rows, as long as they are this attempt's."""

    def __init__(self, claim: Claim, *, read: Sessions, write: Sessions) -> None:
        self.claim = claim
        self.read, self.write = read, write
        self._config: dict[str, Any] = {}

    def news(self, after: int) -> News | None:
        mine = select(Job).where(Job.id == self.claim.job_id, Job.attempt == self.claim.attempt)
        try:
            with self.read.begin() as session:
                job = session.scalar(mine)
                return None if job is None else self._news(session, job, after)
        except DATABASE_AWAY as error:
            logger.warning("The database does not answer: %s", error.orig)
            return News(self._config, [])

    def _news(self, session: Session, job: Job, after: int) -> News:
        spec = job.resolved or (job.spec if job.status in ENDED else {})
        self._config = {"job": job.id, "training_file": job.training_file, **spec}
        rows = [(row.step, curves(row.values)) for row in progress.step_rows(session, job.id, after=after)]
        if job.status not in ENDED:
            return News(self._config, rows)
        return News(self._config, rows, job.status, self._summary(session, job))

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
    """Begins to tell the trackers that the job names."""
    source = JobSource(claim, read=read, write=write)
    try:
        integrations = read_integrations(claim.integrations)
    except BadIntegration as error:  # of a newer version
        logger.warning("Job %s names trackers that are not known here: %s", claim.job_id, error.message)
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
    """Each integration with the id of its run: the second of a kind has its number in it."""
    kinds: Counter[str] = Counter()
    for integration in integrations:
        kinds[integration.type] += 1
        count = kinds[integration.type]
        yield integration, run if count == 1 else f"{run}-{count}"


class Follower:
    """One tracker of one run. `over` says that the work has stopped; it returns at once."""

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
        self._over = threading.Event()
        self._deadline: float | None = None
        # Not a daemon: a worker that ends waits for it, no longer than FINISH_SECONDS.
        self._thread = threading.Thread(target=self._follow, name=f"follow {integration.type}")
        self._thread.start()

    def over(self, *, hurry: bool = False) -> None:
        """Nothing more will come; with `hurry` the tracker is not waited for."""
        self._deadline = time.monotonic() + (0 if hurry else FINISH_SECONDS)
        self._over.set()

    def join(self) -> None:
        """Waits until the tracker knows everything, or is given up."""
        self._thread.join()

    # --- the thread ------------------------------------------------------------------------------------

    def _follow(self) -> None:
        pause = 1.0
        while True:
            try:
                with scratch_folder(self.settings.scratch_folder, self.name) as folder:
                    self._tell(folder)
                return
            except Trouble as trouble:
                self._say(str(trouble))
            except Exception:
                logger.exception("Following run %s for %s failed.", self.run, self.integration.title)
                self._say("the worker met an unexpected error; its log has the details")
            self._over.wait(pause)
            if self._deadline is not None and time.monotonic() + 1 > self._deadline:
                return
            pause = min(LONGEST_PAUSE_SECONDS, 2 * pause)

    def _say(self, reason: str) -> None:
        logger.warning("%s is not told of run %s: %s.", self.integration.title, self.run, reason)
        if not self._warned:
            self._warned = True
            self._warn(
                f"{self.integration.title} is not told of this job for now: {reason}. The job itself goes on."
            )

    def _tell(self, folder: Path) -> None:
        """Tells everything there is, to the end of the run or of this attempt at it. Raises Trouble."""
        try:
            require_offered([self.integration], self.settings)
        except BadIntegration:
            raise Trouble("the worker is not set up for it, which its operator can mend") from None
        kind = self.integration.type
        asked = self.integration.model_dump()[kind]
        order = Order(asked, self.run, keep=str(self.settings.trackers_folder), lose=str(folder))
        environment = tracker_environment(kind, os.environ, self.settings, folder)
        with TrackerProcess(kind, environment, self._patient) as process:
            step = process.ask(begin=asdict(order))["step"]
            self._tell_from(step, process)

    def _tell_from(self, step: int, process: TrackerProcess) -> None:
        config: dict[str, Any] | None = None
        while True:
            over = self._over.is_set()  # asked first: what is there then is all there is
            news = self.source.news(step)
            if news is None:
                return
            if news.config != config:
                config = news.config
                process.ask(config=config)
            # A step's evaluation is recorded before the next step: until then it may still grow.
            rows = news.rows if news.status else news.rows[:-1]
            for start in range(0, len(rows), ROWS_AT_ONCE):
                batch = rows[start : start + ROWS_AT_ONCE]
                process.ask(rows=batch)
                step = batch[-1][0]
            if news.status:
                process.ask(end={"status": news.status, "summary": news.summary})
                return
            if over:
                process.ask(leave={})
                return
            self._over.wait(POLL_SECONDS)

    def _patient(self, asked_at: float) -> bool:
        """Whether to go on waiting for an answer."""
        now = time.monotonic()
        return now < (asked_at + PATIENCE_SECONDS if self._deadline is None else self._deadline)
