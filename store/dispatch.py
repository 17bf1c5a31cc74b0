"""The dispatcher: a server thread that moves waiting jobs forward. Idempotent; several may run at once.

It admits jobs whose files have been checked, takes jobs from lost workers, wakes workers while jobs wait, and
cleans up. A commit that creates work calls `nudge`; otherwise it polls every two seconds.
"""

import logging
import threading
import time
from collections.abc import Callable

from celery import Celery
from sqlalchemy import ColumnElement, Engine, and_, case, or_, select, update
from sqlalchemy.orm import Session

from . import checkpoints, claims, endings, jobs, workers
from .files import purge_files, to_purge
from .idempotency import forget_old_requests
from .models import Checkpoint, File, Job
from .queue import celery_app, remove_leftovers, wake
from .session import Sessions, db_now, read_sessions, sessions
from .settings import Settings
from .storage import Storage, storage

log = logging.getLogger(__name__)

TICK_SECONDS = 2.0
TIDY_SECONDS = 60.0
FIRST_BACK_OFF_SECONDS = 2.0
LAST_BACK_OFF_SECONDS = 60.0
BROKER_BACK_OFF_SECONDS = 30.0
MAX_WAKE_UPS = 16
"""Per tick; a worker that wakes up works until no job is left."""


class Dispatcher(threading.Thread):
    """`start()`, `nudge()` after a commit that creates work, `stop()` at the end."""

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        *,
        store: Storage | None = None,
        app: Celery | None = None,
        tick_seconds: float = TICK_SECONDS,
    ) -> None:
        super().__init__(name="dispatcher", daemon=True)
        self.settings = settings
        self.tick_seconds = tick_seconds
        self._sessions: Sessions = sessions(engine)
        self._readers: Sessions = read_sessions(engine)
        self._store = store or storage(settings)
        self._app = app or celery_app(settings)
        self._nudged = threading.Event()
        self._stopping = threading.Event()
        self._errors: dict[str, str] = {}
        self._next_tidying = 0.0
        self._pending_wake_ups = 0
        self._next_sending = 0.0
        self._broker_back_off = FIRST_BACK_OFF_SECONDS

    def nudge(self) -> None:
        """Wakes the thread because there is work. Returns at once."""
        self._nudged.set()

    def stop(self, timeout: float = 10.0) -> None:
        """Ends the thread after its current round."""
        self._stopping.set()
        self._nudged.set()
        if self.is_alive():
            self.join(timeout)

    def run(self) -> None:
        while not self._stopping.is_set():
            nudged = self._nudged.is_set()
            self._nudged.clear()
            self.tick(tidy=nudged)
            self._nudged.wait(self.tick_seconds)

    def tick(self, *, tidy: bool = False) -> None:
        """One round. A part that fails (the database may be down) is logged once and retried each round."""
        self._try("admit jobs", self._admit)
        self._try("take jobs from lost workers", self._sweep)
        self._try("see which jobs wait", self._count_wake_ups)
        self._try("wake workers", self._send_wake_ups)
        self._try("tell who waits in vain", self._tell_waiting)
        if tidy or time.monotonic() >= self._next_tidying:
            self._try("remove deleted files", self._purge)
        self._try("reduce checkpoints", self._finish_checkpoints)
        if time.monotonic() >= self._next_tidying:
            self._next_tidying = time.monotonic() + TIDY_SECONDS
            self._try("tidy up", self._tidy)

    def _try(self, what: str, part: Callable[[], object]) -> None:
        try:
            part()
        except Exception as error:
            error_line = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            if self._errors.get(what) != error_line:
                log.warning("The dispatcher cannot %s and keeps trying: %s", what, error_line)
            self._errors[what] = error_line
        else:
            if self._errors.pop(what, None):
                log.warning("The dispatcher can %s again.", what)

    def _admit(self) -> None:
        while self._any(Job.status == "validating_files"):
            with self._sessions.begin() as session:
                if not jobs.admit(session, self.settings):
                    return

    def _sweep(self) -> None:
        if self._any(claims.lease_expired()):
            with self._sessions.begin() as session:
                endings.sweep(session, self.settings)

    def _count_wake_ups(self) -> None:
        if not self._any(and_(claims.claimable(), wake_up_due())):
            return
        with self._sessions.begin() as session:
            self._pending_wake_ups = max(self._pending_wake_ups, take_wake_ups(session))

    def _send_wake_ups(self) -> None:
        """An unreachable broker is retried after 2, 4, … 30 seconds."""
        if not self._pending_wake_ups or time.monotonic() < self._next_sending:
            return
        if wake(self._app, self._pending_wake_ups):
            self._pending_wake_ups, self._broker_back_off = 0, FIRST_BACK_OFF_SECONDS
        else:
            self._next_sending = time.monotonic() + self._broker_back_off
            self._broker_back_off = min(BROKER_BACK_OFF_SECONDS, 2 * self._broker_back_off)

    def _tell_waiting(self) -> None:
        if self._any(workers.waits_in_vain()):
            with self._sessions.begin() as session:
                workers.tell_waiting(session)

    def _purge(self) -> None:
        with self._readers() as session:
            due = session.scalar(select(File.seq).where(to_purge()).limit(1))
        if due is not None:
            purge_files(self._sessions, self._store)

    def _finish_checkpoints(self) -> None:
        """One a round: each is copied."""
        with self._readers() as session:
            due = session.scalar(select(Checkpoint.seq).where(checkpoints.to_finish()).limit(1))
        if due is not None:
            checkpoints.finish_checkpoint(self._sessions, self._store, self.settings.home)

    def _any(self, condition: ColumnElement[bool]) -> bool:
        """Checks without taking a lock."""
        with self._readers() as session:
            return session.scalar(select(Job.seq).where(condition).limit(1)) is not None

    def _tidy(self) -> None:
        self._store.remove_part_leftovers()
        remove_leftovers(self.settings)
        with self._sessions.begin() as session:
            forget_old_requests(session)
            workers.forget_lost(session)


def wake_up_due() -> ColumnElement[bool]:
    """No wake-up has been sent since the job was queued, or the last one is so old that it may be lost."""
    return or_(Job.dispatches == 0, Job.dispatched_at <= db_now() - _back_off_seconds())


def _back_off_seconds() -> ColumnElement[float]:
    """2, 4, 8, 16, 32, 60, 60, …"""
    steps = [(Job.dispatches == n, FIRST_BACK_OFF_SECONDS * 2 ** (n - 1)) for n in range(1, 6)]
    return case(*steps, else_=LAST_BACK_OFF_SECONDS)


def take_wake_ups(session: Session) -> int:
    """Marks the jobs that are due for a wake-up. Returns how many to send.

    One for each job that has had none, up to a limit; if there is no such job, a single one for all others.
    """
    fresh = select(Job.seq).where(claims.claimable(), Job.dispatches == 0).order_by(Job.seq)
    first = _mark(session, Job.dispatches == 0, Job.seq.in_(fresh.limit(MAX_WAKE_UPS)))
    again = _mark(session, claims.claimable(), Job.dispatches > 0, wake_up_due())
    return first or min(again, 1)


def _mark(session: Session, *due: ColumnElement[bool]) -> int:
    marked = update(Job).where(*due).values(dispatches=Job.dispatches + 1, dispatched_at=db_now())
    rows = session.execute(marked.returning(Job.seq).execution_options(synchronize_session=False))
    return len(rows.all())
