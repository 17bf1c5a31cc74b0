"""Claims jobs and has them trained, one after another, by a trainer process that is kept between them.

No torch here: this runs inside the Celery worker, which must answer while a job trains.
"""

import logging
import os
import socket
import threading
import time
import uuid

from store import claims
from store.errors import LeaseLost
from store.session import DATABASE_AWAY, make_engine, read_sessions, sessions
from store.settings import Settings
from store.storage import storage

from ..scratch import remove_orphans, scratch_folder
from ..tracking.follower import follow
from .attempt import Attempt
from .presence import Presence, describe
from .token_folders import trim_tokens
from .trainer_process import TrainerProcess

logger = logging.getLogger(__name__)


class Supervisor:
    """One worker's slot. `run_until_idle` and `close` are called from one thread, `stop` from anywhere."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.engine = make_engine(settings.database_url)
        self.write, self.read = sessions(self.engine), read_sessions(self.engine)
        self.storage = storage(settings)
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self.stopping = False
        self.force_stop = False
        self.trainer: TrainerProcess | None = None
        self.presence = Presence(describe(self.owner), self.write)
        self._lock = threading.Lock()
        self._idle_timer: threading.Timer | None = None

    def begin(self) -> None:
        """Removes what dead workers of this machine left behind, and begins to report this one.

        Call it once, at the start.
        """
        for name in remove_orphans(self.settings.scratch_folder):
            logger.info("Removed the scratch folder of attempt %s, whose worker died.", name)
        trim_tokens(self.settings)
        self.presence.start()

    def run_until_idle(self) -> int:
        """Claims and runs jobs until none is left or the worker ends. Returns the number of attempts.

        Returns early if the database does not answer: waiting jobs get another wake-up later.
        """
        attempts = 0
        with self._lock:
            self._stop_idle_timer()
            try:
                while not self.stopping and self._run_next():
                    attempts += 1
            except DATABASE_AWAY as error:
                logger.warning("The database does not answer: %s", error.orig)
            self._start_idle_timer()
        return attempts

    def stop(self) -> None:
        """First call: saves a checkpoint, then releases the job. Second call: releases it at once."""
        self.force_stop = self.stopping
        self.stopping = True

    def close(self) -> None:
        """Ends the trainer, and tells the service that this worker is gone."""
        with self._lock:
            self._stop_idle_timer()
            self._close_trainer()
        self.presence.stop()

    def _run_next(self) -> bool:
        taken_at = time.monotonic()
        with self.write() as session:
            claim = claims.claim(session, owner=self.owner, lease_seconds=self.settings.lease_seconds)
            session.commit()
        if claim is None:
            return False
        name = f"{claim.job_id}-{claim.attempt}"
        logger.info("Attempt %s begins.", name)
        self.presence.works_on(claim.job_id)
        with scratch_folder(self.settings.scratch_folder, name) as folder:
            attempt = Attempt(
                claim,
                taken_at=taken_at,
                settings=self.settings,
                write=self.write,
                read=self.read,
                storage=self.storage,
                trainer=self._trainer_for(claim.project_id),
                shutdown=self,
                folder=folder,
            )
            followers = follow(claim, settings=self.settings, read=self.read, write=self.write)
            try:
                attempt.run()
            except LeaseLost as lost:
                logger.warning("%s", lost.message)
            except Exception:
                # The lease runs out, and then the job goes to another attempt.
                logger.exception("Attempt %s ended without an entry in its row.", name)
                attempt.trainer.kill()
            finally:
                self.presence.works_on(None)
                for follower in followers:
                    follower.stop()
        trim_tokens(self.settings)
        logger.info("Attempt %s is over.", name)
        return True

    # --- the trainer -----------------------------------------------------------------------------------

    def _trainer_for(self, project_id: str) -> TrainerProcess:
        """The running trainer, or a new one: a trainer that saw a project's data serves no other project."""
        trainer = self.trainer
        if trainer is None or not trainer.alive or trainer.project_id != project_id:
            self._close_trainer()
            trainer = self.trainer = TrainerProcess(project_id)
        return trainer

    def _close_trainer(self) -> None:
        if self.trainer is not None:
            self.trainer.close()
            self.trainer = None

    def _start_idle_timer(self) -> None:
        """Frees the base model's memory if no job comes for a while."""
        if self.trainer is not None:
            self._idle_timer = threading.Timer(self.settings.idle_seconds, self._rest)
            self._idle_timer.daemon = True
            self._idle_timer.start()

    def _rest(self) -> None:
        with self._lock:
            self._close_trainer()

    def _stop_idle_timer(self) -> None:
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None
