"""The transactions of one attempt: repeated while the database is away, refused once the lease is lost."""

import logging
import time
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

from sqlalchemy import select
from sqlalchemy.orm import Session

from store import claims
from store.claims import Claim, StopRequest
from store.errors import LeaseLost
from store.models import Job
from store.session import DATABASE_AWAY, Sessions

from .lease import Lease

logger = logging.getLogger(__name__)
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 2.0


class FencedSessions:
    """Runs functions of the store in transactions of their own. Every method raises LeaseLost."""

    def __init__(self, claim: Claim, lease: Lease, *, write: Sessions, read: Sessions) -> None:
        self.claim = claim
        self.lease = lease
        self._write, self._read = write, read

    def write(
        self,
        change: Callable[Concatenate[Session, Claim, Arguments], Result],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Result:
        """Returns `change(session, claim, …)`, committed. `change` fences itself with `write_as`.

        A commit whose answer was lost is repeated: `change` must bear being done twice.
        """
        return self._retry(self._write, lambda session: change(session, self.claim, *args, **kwargs))

    def read(
        self,
        question: Callable[Concatenate[Session, Arguments], Result],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Result:
        """Returns `question(session, …)`."""
        return self._retry(self._read, lambda session: question(session, *args, **kwargs))

    def end(
        self,
        change: Callable[Concatenate[Session, Claim, Arguments], Result],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Result:
        """The attempt's last `write`, which gives the job up."""
        self.lease.stop()  # a renewal after it would take the released job for a lost one
        return self.write(change, *args, **kwargs)

    def check(self) -> None:
        """Does nothing while the lease holds."""
        if self.lease.lost:
            raise LeaseLost(self.claim.job_id, self.claim.attempt)

    def _retry(self, sessions: Sessions, work: Callable[[Session], Result]) -> Result:
        pause = FIRST_PAUSE_SECONDS
        while True:
            self.check()
            try:
                with sessions.begin() as session:
                    return work(session)
            except DATABASE_AWAY as error:
                logger.warning("The database does not answer; trying again: %s", error.orig)
                time.sleep(pause)
                pause = min(LONGEST_PAUSE_SECONDS, 2 * pause)


def renew(write: Sessions, claim: Claim, lease_seconds: float) -> StopRequest | None:
    """Extends the lease in the row. Returns the owner's stop request. Raises LeaseLost."""
    with write.begin() as session:
        return claims.renew(session, claim, lease_seconds)


def requested_stop(read: Sessions, claim: Claim) -> StopRequest | None:
    """The owner's stop request, read without a lock. Raises LeaseLost."""
    with read.begin() as session:
        status = session.scalar(select(Job.status).where(claims.held_by(claim)))
    if status is None:
        raise LeaseLost(claim.job_id, claim.attempt)
    return claims.stop_request(status)
