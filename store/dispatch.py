"""The dispatcher: a thread of the server that moves waiting rows on. Idempotent; any number may run at once.

It admits jobs whose files are checked, takes jobs from lost workers, wakes workers while jobs wait, and
tidies up. A commit that made work nudges it; otherwise it looks every two seconds.
"""

import logging
import threading
import time
from collections.abc import Callable

from celery import Celery
from sqlalchemy import ColumnElement, Engine, and_, case, or_, select, update
from sqlalchemy.orm import Session

from . import claims, jobs
from .files import purge_files, to_purge
from .idempotency import forget_old_requests
from .models import File, Job
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
MOST_WAKE_UPS = 16
"""In one tick; a worker that wakes goes on by itself until nothing is left."""


class Dispatcher(threading.Thread):
    """`start()`, `nudge()` after a commit that made work, `stop()` at the end."""

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
        self._troubles: dict[str, str] = {}
        self._next_tidying = 0.0
        self._owed = 0
        self._next_sending = 0.0
        self._broker_rest = FIRST_BACK_OFF_SECONDS

    def nudge(self) -> None:
        """There is work. Returns at once."""
        self._nudged.set()

    def stop(self, timeout: float = 10.0) -> None:
        """Ends the thread after what it is doing."""
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
        """One round. A part that fails (the database is away) is logged once and tried again next time."""
        self._try("admit jobs", self._admit)
        self._try("take jobs from lost workers", self._sweep)
        self._try("see which jobs wait", self._note_wake_ups)
        self._try("wake workers", self._send_wake_ups)
        if tidy or time.monotonic() >= self._next_tidying:
            self._try("remove deleted files", self._purge)
        if time.monotonic() >= self._next_tidying:
            self._next_tidying = time.monotonic() + TIDY_SECONDS
            self._try("tidy up", self._tidy)

    def _try(self, what: str, part: Callable[[], object]) -> None:
        try:
            part()
        except Exception as error:
            trouble = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            if self._troubles.get(what) != trouble:
                log.warning("The dispatcher cannot %s and keeps trying: %s", what, trouble)
            self._troubles[what] = trouble
        else:
            if self._troubles.pop(what, None):
                log.warning("The dispatcher can %s again.", what)

    def _admit(self) -> None:
        while self._any(Job.status == "validating_files"):
            with self._sessions.begin() as session:
                if not jobs.admit(session, self.settings):
                    return

    def _sweep(self) -> None:
        if self._any(claims.lease_is_over()):
            with self._sessions.begin() as session:
                jobs.sweep(session, self.settings)

    def _note_wake_ups(self) -> None:
        if not self._any(and_(claims.claimable(), wake_up_due())):
            return
        with self._sessions.begin() as session:
            self._owed = max(self._owed, take_wake_ups(session))

    def _send_wake_ups(self) -> None:
        """A broker that is away is tried again after 2, 4, … 30 seconds."""
        if not self._owed or time.monotonic() < self._next_sending:
            return
        if wake(self._app, self._owed):
            self._owed, self._broker_rest = 0, FIRST_BACK_OFF_SECONDS
        else:
            self._next_sending = time.monotonic() + self._broker_rest
            self._broker_rest = min(BROKER_BACK_OFF_SECONDS, 2 * self._broker_rest)

    def _purge(self) -> None:
        with self._readers() as session:
            due = session.scalar(select(File.seq).where(to_purge()).limit(1))
        if due is not None:
            purge_files(self._sessions, self._store)

    def _any(self, condition: ColumnElement[bool]) -> bool:
        """A look that takes no lock."""
        with self._readers() as session:
            return session.scalar(select(Job.seq).where(condition).limit(1)) is not None

    def _tidy(self) -> None:
        self._store.remove_part_leftovers()
        remove_leftovers(self.settings)
        with self._sessions.begin() as session:
            forget_old_requests(session)


def wake_up_due() -> ColumnElement[bool]:
    """No wake-up was sent since the job was queued, or the last one so long ago that it may be lost."""
    return or_(Job.dispatches == 0, Job.dispatched_at <= db_now() - _back_off_seconds())


def _back_off_seconds() -> ColumnElement[float]:
    """2, 4, 8, 16, 32, 60, 60, …"""
    steps = [(Job.dispatches == n, FIRST_BACK_OFF_SECONDS * 2 ** (n - 1)) for n in range(1, 6)]
    return case(*steps, else_=LAST_BACK_OFF_SECONDS)


def take_wake_ups(session: Session) -> int:
    """Notes on the jobs that are due that they get a wake-up now. Returns how many to send.

    One for each job that never had any, up to a limit; a single one for all that had one before.
    """
    fresh = select(Job.seq).where(claims.claimable(), Job.dispatches == 0).order_by(Job.seq)
    first = _note(session, Job.dispatches == 0, Job.seq.in_(fresh.limit(MOST_WAKE_UPS)))
    again = _note(session, claims.claimable(), Job.dispatches > 0, wake_up_due())
    return first or min(again, 1)


def _note(session: Session, *due: ColumnElement[bool]) -> int:
    noted = update(Job).where(*due).values(dispatches=Job.dispatches + 1, dispatched_at=db_now())
    rows = session.execute(noted.returning(Job.seq).execution_options(synchronize_session=False))
    return len(rows.all())
