"""One attempt at a job: from its files in a scratch folder to its adapter, or its report, in the storage.

Every write to the rows is fenced: once the lease is lost, none of them takes effect.
"""

import dataclasses
import errno
import logging
import queue
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from olora_core.errors import CheckpointError, OloraError
from store import claims, control, endings, jobs, progress
from store.claims import Claim
from store.errors import LeaseLost, StorageError
from store.kinds import COMPARISON, EXPORT, FINE_TUNING
from store.models import Checkpoint, Job
from store.session import DATABASE_AWAY, Sessions
from store.settings import Settings
from store.statuses import ENDED
from store.storage import Storage

from ..protocol import Ended, Order, StopRequest
from .fenced import FencedSessions, renew, requested_stop
from .inputs import Inputs
from .lease import Lease
from .limits import Limits, read_limits
from .publisher import ComparisonPublisher, ExportPublisher, FineTuningPublisher, Publisher
from .recorder import ComparisonRecorder, FineTuningRecorder, Recorder
from .strays import remove_strays
from .trainer_process import TrainerProcess

logger = logging.getLogger(__name__)
LISTEN_SECONDS = 0.1
CANCEL_SECONDS = 15.0
"""A cancelled trainer that has not reached its next step by then is killed."""
RELEASE_SECONDS = 90.0
"""A trainer that is released, because of a pause or the worker's end, and
has not saved its checkpoint by then is killed."""


@dataclasses.dataclass(frozen=True)
class Handlers:
    """What the kinds of work do differently."""

    recorder: type[Recorder]
    publisher: type[Publisher]


HANDLERS = {
    FINE_TUNING.name: Handlers(FineTuningRecorder, FineTuningPublisher),
    COMPARISON.name: Handlers(ComparisonRecorder, ComparisonPublisher),
    EXPORT.name: Handlers(FineTuningRecorder, ExportPublisher),
}


class Shutdown(Protocol):
    """Whether the worker is stopping, and whether it has no time left for a checkpoint."""

    stopping: bool
    force_stop: bool


class Stopped(Exception):
    """The trainer was stopped on request: its owner's, or the worker's own."""


class Crashed(Exception):
    """This attempt failed; another may succeed."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


class Attempt:
    """Drives the trainer through one claimed job. What comes back goes to `recorder` and `publisher`."""

    def __init__(
        self,
        claim: Claim,
        *,
        taken_at: float,
        settings: Settings,
        write: Sessions,
        read: Sessions,
        storage: Storage,
        trainer: TrainerProcess,
        shutdown: Shutdown,
        folder: Path,
    ) -> None:
        self.claim = claim
        self.settings = settings
        self.read = read
        self.storage = storage
        self.trainer = trainer
        self.shutdown = shutdown
        self.folder = folder
        self.run_name = f"{claim.job_id}-{claim.attempt}"
        self.lease = Lease(
            seconds=settings.lease_seconds,
            taken_at=taken_at,
            renew=partial(renew, write, claim, settings.lease_seconds),
            poll=partial(requested_stop, read, claim),
            on_renewal=self._send_deadline,
            on_stop_request=self._on_owners_request,
            on_lost=trainer.kill,
        )
        self.fenced = FencedSessions(claim, self.lease, write=write, read=read)
        self.inputs = Inputs(self.fenced, settings=settings, storage=storage, folder=folder)
        handlers = HANDLERS[claim.kind.name]
        self.recorder = handlers.recorder(self.fenced)
        self.publisher = handlers.publisher(
            self.fenced, self.recorder, settings=settings, storage=storage, folder=folder
        )
        self._stop_request: StopRequest | None = None
        self._requested_at = 0.0
        self.limits = Limits()

    def run(self) -> None:
        """Runs the job, and records in its row how the attempt ended. Raises LeaseLost."""
        with self.lease:
            try:
                try:
                    self._work()
                except Exception as error:
                    self._end(error)
            except LeaseLost:
                self.trainer.kill()
                self._remove_strays(self.claim.attempt)
                raise

    def _work(self) -> None:
        """From the job's inputs to its results. `_end` decides what an error means for the job."""
        claim = self.claim
        try:
            self._remove_strays()
            job = self.fenced.read(jobs.get_job, claim.project_id, claim.job_id, claim.kind)
            self.inputs.check_devices(job)
            self.limits = self.fenced.read(read_limits, job)
            self.recorder.stage("fetching")
            order = self.inputs.order(job, run=self.run_name, deadline=self.lease.trainer_deadline)
            finished = self._train(order)
            self.recorder.stage("publishing")
            self._tidy_after(self.publisher.publish(job, finished))
        finally:
            self.recorder.flush()

    def _end(self, error: Exception) -> None:
        """Fails the job, or hands it back to be tried again. Raises LeaseLost.

        The order of the cases matters: a lost lease or failing storage says nothing about the job, and must
        not be taken for one of the expected errors that fail it.
        """
        match error:
            case LeaseLost():
                raise error
            case StorageError():
                self._crash(error.code, error.message)
            case Stopped():
                self._hand_back("released", "The worker was stopped.", crashed=False)
            case Crashed():
                self._crash(error.reason, error.message)
            case OloraError():
                self._tidy_after(self.fenced.end(endings.fail, error))
            case OSError(errno=errno.ENOSPC):
                self._crash("disk_full", "No space is left on the worker's disk.")
            case _:
                logger.error("Attempt %s failed with an unexpected error.", self.run_name, exc_info=error)
                message = "An unexpected error occurred; the worker's log has the details."
                self._crash("worker_error", message)

    def _crash(self, reason: str, message: str) -> None:
        self.trainer.kill()
        self._hand_back(reason, message, crashed=True)

    def _hand_back(self, reason: str, message: str, *, crashed: bool) -> None:
        limit = self.settings.max_failures
        self._tidy_after(
            self.fenced.end(
                endings.hand_back, reason=reason, message=message, crashed=crashed, max_failures=limit
            )
        )

    def _tidy_after(self, job: Job) -> None:
        """Only once the job has ended: another attempt may hold it, and store what no row names yet."""
        if job.status in ENDED:
            self._remove_strays()

    def _remove_strays(self, attempt: int | None = None) -> None:
        try:
            remove_strays(self.read, self.storage, self.claim.job_id, attempt=attempt)
        except (StorageError, *DATABASE_AWAY):
            logger.warning("Attempt %s could not tidy up the storage.", self.run_name, exc_info=True)

    # --- the training ----------------------------------------------------------------------------------

    def _train(self, order: Order) -> dict[str, Any]:
        """Trains from the furthest stored checkpoint that can be used. Returns what `_drive` does."""
        stored = self.fenced.read(progress.stored_checkpoints, self.claim.job_id)
        for position, checkpoint in enumerate(stored):
            try:
                folder = self.inputs.checkpoint(checkpoint)
                return self._drive(dataclasses.replace(order, resume=str(folder)))
            except CheckpointError as error:
                self._warn_unusable(checkpoint, stored[position + 1 :], error.message)
        return self._drive(order)

    def _warn_unusable(self, checkpoint: Checkpoint, others: Sequence[Checkpoint], reason: str) -> None:
        onward = f"the one before, at step {others[0].step}" if others else "the start"
        self.recorder.note(
            "warn",
            f"The checkpoint at step {checkpoint.step} cannot be used; "
            f"the {self.claim.kind.word} resumes from {onward}.",
            {"step": checkpoint.step, "reason": reason},
        )

    def _drive(self, order: Order) -> dict[str, Any]:
        """Has the trainer carry out the order. Returns the fields of its `Finished` or `Compared`."""
        if self._stop_request is not None:
            raise Stopped
        Path(order.folder).mkdir(exist_ok=True)
        self.trainer.send(dataclasses.replace(order, deadline=self.lease.trainer_deadline).as_message())
        if self._stop_request is not None:  # it may have come before the trainer knew of this attempt
            self._request_stop(self._stop_request)
        last_message_at = time.monotonic()
        while True:
            message = self._next_message()
            self._check_stop_conditions()
            if message is not None:
                last_message_at = time.monotonic()
                finished = self._on_message(message)
                if finished is not None:
                    return finished
            elif time.monotonic() > last_message_at + self.settings.stall_seconds:
                silence = f"The training process sent no message for {self.settings.stall_seconds:g} s."
                raise Crashed("stalled", silence)
            self.recorder.flush_if_due()

    def _next_message(self) -> dict[str, Any] | Ended | None:
        try:
            return self.trainer.messages.get(timeout=LISTEN_SECONDS)
        except queue.Empty:
            return None

    def _check_stop_conditions(self) -> None:
        now = time.monotonic()
        self.fenced.check()
        if self.shutdown.stopping and self._stop_request is None:
            self._request_stop("release")
        patience = CANCEL_SECONDS if self._stop_request == "cancel" else RELEASE_SECONDS
        nothing_to_save = self._stop_request == "release" and not self.recorder.stepped
        if self._stop_request is not None and (nothing_to_save or now > self._requested_at + patience):
            self._stop_now()
        if self.shutdown.force_stop:
            self._stop_now()
        if self._stop_request is None and (limit := self.limits.reached()) is not None:
            self.fenced.write(control.pause_at_limit, limit.reason, limit.sentence)
            self._request_stop("release")

    def _stop_now(self) -> None:
        self.trainer.kill()
        raise Stopped

    def _on_message(self, message: dict[str, Any] | Ended) -> dict[str, Any] | None:
        """Returns the fields of `Finished` or `Compared`, which end the job; None for everything else."""
        match message:
            case Ended():
                raise Crashed("trainer_lost", message.sentence)
            case {"progress": progress}:
                return self._on_progress(**progress)
            case {"stopped": _}:
                raise Stopped
            case {"crashed": {"message": sentence}}:
                raise Crashed("trainer_crashed", sentence)
            case {"failed": {"code": CheckpointError.code, "message": sentence}}:
                raise CheckpointError(sentence)
            case {"failed": {"code": code, "message": sentence, "param": param}}:
                raise OloraError(sentence, param=param, code=code)
            case {"ready": {"pid": pid, "device": device}}:
                logger.info("Trainer %s is ready on %s.", pid, device)
        return None

    def _on_progress(self, kind: str, **values: Any) -> dict[str, Any] | None:
        match kind:
            case "Finished" | "Compared":
                return values
            case "Saved":
                folder = Path(values["folder"])
                self.publisher.store_checkpoint(folder, values)
            case _:
                self.limits.count(kind, values)
                self.recorder.record(kind, values)
        return None

    # --- the lease's thread ----------------------------------------------------------------------------

    def _send_deadline(self, deadline: float) -> None:
        self.trainer.send({"lease": {"run": self.run_name, "deadline": deadline}})

    def _on_owners_request(self, request: claims.StopRequest) -> None:
        self._request_stop("release" if request == "pause" else "cancel")

    def _request_stop(self, request: StopRequest) -> None:
        if self._stop_request != request:
            self._stop_request, self._requested_at = request, time.monotonic()
        self.trainer.send({"stop": {"run": self.run_name, "request": request}})
