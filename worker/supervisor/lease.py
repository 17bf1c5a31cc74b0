"""A job's lease, as the supervisor holds it: renewed in time, and given up when it is lost."""

import logging
import threading
import time
from collections.abc import Callable

from store.claims import StopRequest
from store.errors import LeaseLost
from store.session import DATABASE_AWAY

logger = logging.getLogger(__name__)
TRAINER_SHARE = 0.8
"""The trainer's deadline, as a share of the lease: it stops before another worker can claim the job."""
POLL_SECONDS = 0.5


class Lease:
    """Renews the lease at a quarter of its time and polls for a stop request in between, in a thread.

    `taken_at` is the monotonic time before the claim. `renew` and `poll` return the owner's stop request and
    raise LeaseLost. `on_renewal` gets the trainer's new deadline, `on_stop_request` each new request;
    `on_lost` is called once.
    """

    def __init__(
        self,
        *,
        seconds: float,
        taken_at: float,
        renew: Callable[[], StopRequest | None],
        poll: Callable[[], StopRequest | None],
        on_renewal: Callable[[float], None],
        on_stop_request: Callable[[StopRequest], None],
        on_lost: Callable[[], None],
    ) -> None:
        self.seconds = seconds
        self.taken_at = taken_at
        self._renew, self._poll = renew, poll
        self._on_renewal, self._on_stop_request, self._on_lost = on_renewal, on_stop_request, on_lost
        self._request: StopRequest | None = None
        self._done = threading.Event()
        self._lost = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)

    def __enter__(self) -> "Lease":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stops renewing. Call it before the row is released, which must not look like a lost lease."""
        self._done.set()
        self._thread.join()

    @property
    def trainer_deadline(self) -> float:
        return self.taken_at + TRAINER_SHARE * self.seconds

    @property
    def lost(self) -> bool:
        """Whether another worker may hold the job already, according to the row or to the clock."""
        return self._lost.is_set() or time.monotonic() > self.taken_at + self.seconds

    def _run(self) -> None:
        while not self._done.wait(min(POLL_SECONDS, self.seconds / 8)):
            try:
                self._renew_or_poll()
            except LeaseLost as error:
                logger.warning("%s", error.message)
                self._lost.set()
            except DATABASE_AWAY as error:
                logger.warning("The database does not answer: %s", error.orig)
            if self.lost:
                self._lost.set()
                self._on_lost()
                return

    def _renew_or_poll(self) -> None:
        now = time.monotonic()
        if now < self.taken_at + self.seconds / 4:
            request = self._poll()
        else:
            request = self._renew()
            self.taken_at = now
            self._on_renewal(self.trainer_deadline)
        if request is not None and request != self._request:
            self._request = request
            self._on_stop_request(request)
