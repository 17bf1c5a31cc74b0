"""A job's lease, as the supervisor holds it: renewed in time, given up when it is lost."""

import logging
import threading
import time
from collections.abc import Callable

from store.errors import LeaseLost
from store.session import DATABASE_AWAY

logger = logging.getLogger(__name__)
TRAINER_SHARE = 0.8
"""The trainer stops before the lease ends, so that nobody else can be training the job already."""
LOOK_SECONDS = 0.5


class Lease:
    """Renews at a quarter of the lease, and looks for the owner's wish in between, in a thread of its own.

    `renew` and `look` return the wish and raise LeaseLost; `taken_at` is the monotonic time before the
    claim. `on_renewal` is told the trainer's new deadline, `on_wish` each new wish, `on_lost` the end.
    """

    def __init__(
        self,
        *,
        seconds: float,
        taken_at: float,
        renew: Callable[[], str | None],
        look: Callable[[], str | None],
        on_renewal: Callable[[float], None],
        on_wish: Callable[[str], None],
        on_lost: Callable[[], None],
    ) -> None:
        self.seconds = seconds
        self.taken_at = taken_at
        self._renew, self._look = renew, look
        self._on_renewal, self._on_wish, self._on_lost = on_renewal, on_wish, on_lost
        self._wish: str | None = None
        self._done = threading.Event()
        self._lost = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def __enter__(self) -> "Lease":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Renews no more: the row is about to be given up, which must not look like a loss."""
        self._done.set()
        self._thread.join()

    @property
    def trainer_deadline(self) -> float:
        return self.taken_at + TRAINER_SHARE * self.seconds

    @property
    def lost(self) -> bool:
        """Whether the row may already belong to somebody else, by the database's word or by the clock's."""
        return self._lost.is_set() or time.monotonic() > self.taken_at + self.seconds

    def _beat(self) -> None:
        while not self._done.wait(min(LOOK_SECONDS, self.seconds / 8)):
            try:
                self._keep()
            except LeaseLost as error:
                logger.warning("%s", error.message)
                self._lost.set()
            except DATABASE_AWAY as error:
                logger.warning("The database does not answer: %s", error.orig)
            if self.lost:
                self._lost.set()
                self._on_lost()
                return

    def _keep(self) -> None:
        now = time.monotonic()
        if now < self.taken_at + self.seconds / 4:
            wish = self._look()
        else:
            wish = self._renew()
            self.taken_at = now
            self._on_renewal(self.trainer_deadline)
        if wish is not None and wish != self._wish:
            self._wish = wish
            self._on_wish(wish)
