"""One attempt at a job: from its files in a scratch folder to its adapter, or its report, in the storage.

Everything that it writes to the rows is fenced: once the lease is lost, nothing of it holds.
"""

import dataclasses
import errno
import hashlib
import logging
import math
import queue
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from olora_core.errors import CheckpointError, OloraError
from olora_core.progress import Level, Note
from olora_core.specs import TrainSpec
from store import claims, comparisons, fine_tuned, jobs, progress
from store.bases import fetch_base, find_base
from store.comparisons import EndedRun
from store.errors import LeaseLost, StorageError, StoreError
from store.kinds import COMPARISON
from store.models import Attempt as AttemptRow
from store.models import Checkpoint, Job
from store.session import DATABASE_AWAY, Sessions
from store.settings import Settings
from store.storage import Storage

from ..protocol import Ended, Order
from ..tracking.curves import EventFile, curves, event_file_name
from .archive import pack
from .lease import Lease
from .strays import checkpoint_folder, remove_strays, result_folder
from .token_folders import tokens_folder
from .trainer_process import TrainerProcess

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
LISTEN_SECONDS = 0.1
RECORD_SECONDS = 1.0
EVALUATION_SECONDS = 0.5
"""A step whose evaluation has not begun by then has none."""
CANCEL_SECONDS = 15.0
"""A cancelled trainer that has not come to its next step by then is killed."""
RELEASE_SECONDS = 90.0
"""Likewise one that has not saved its checkpoint by then."""
METRICS_FILE = "step_metrics.csv"
WEIGHTS_FILES = {"adapter": "adapter.zip", "merged": "model.zip"}
"""By the spec's `export`."""
PAGE_FILE, REPORT_FILE = "comparison.html", "comparison.json"


class Shutdown(Protocol):
    """Whether the worker is about to end, and whether it has no time left for a checkpoint."""

    stopping: bool
    hurrying: bool


class _Failed(Exception):
    """The job cannot be done; another attempt would end the same."""

    def __init__(self, error: OloraError) -> None:
        super().__init__(error.message)
        self.error = error


class _Crashed(Exception):
    """This attempt could not be done; another one may."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


class _Stopped(Exception):
    """The trainer was stopped by a wish: "cancel" or "release"."""

    def __init__(self, wish: str) -> None:
        super().__init__(wish)
        self.wish = wish


@dataclasses.dataclass
class _Unrecorded:
    """What the trainer said since the last write to the rows."""

    steps: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    evaluations: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    events: list[Note] = dataclasses.field(default_factory=list)
    resolved: TrainSpec | None = None
    total_steps: int | None = None
    samples: dict[str, Any] | None = None
    compared: dict[str, Any] | None = None
    """Of a comparison the newest step; it is all that is kept of its steps."""


class Attempt:
    """Drives the trainer through one claimed job and records what comes back."""

    def __init__(
        self,
        claim: claims.Claim,
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
        self.write, self.read = write, read
        self.storage = storage
        self.trainer = trainer
        self.shutdown = shutdown
        self.folder = folder
        self.run_name = f"{claim.job_id}-{claim.attempt}"
        self.lease = Lease(
            seconds=settings.lease_seconds,
            taken_at=taken_at,
            renew=self._renew,
            look=self._look,
            on_renewal=self._tell_deadline,
            on_wish=self._tell_wish,
            on_lost=trainer.kill,
        )
        self._wish: str | None = None
        self._wished_at = 0.0
        self._time_up: float | None = None
        self._refusal: str | None = None
        self._stepped = False
        self._stepped_at = 0.0
        self._first_compared: tuple[int, float] | None = None
        self._evaluating = False
        self._saved: Counter[int] = Counter()
        self._unrecorded = _Unrecorded()
        self._recorded_at = time.monotonic()

    def run(self) -> None:
        """The whole attempt, to a row that says how it ended. Raises LeaseLost."""
        with self.lease:
            try:
                self._do_and_end()
            except LeaseLost:
                self.trainer.kill()
                self._remove_strays(self.claim.attempt)
                raise

    def _do_and_end(self) -> None:
        try:
            self._do()
        except _Failed as failure:
            self._fail(failure.error)
        except _Stopped as stop:
            self._stopped(stop.wish)
        except _Crashed as crash:
            self.trainer.kill()
            self._hand_back(crash.reason, crash.message, crashed=True)

    def _do(self) -> None:
        try:
            self._remove_strays()
            claim = self.claim
            job = self._ask(lambda session: jobs.get_job(session, claim.project_id, claim.job_id, claim.kind))
            self._check_devices(job)
            self._time_up = self._time_limit(job)
            finished = self._train(self._fetch(job))
            self._publish(job, finished)
        except (LeaseLost, _Failed, _Stopped, _Crashed):
            raise
        except StorageError as error:  # before OloraError, which it is too: another attempt may do better
            raise _Crashed(error.code, error.message) from error
        except OloraError as error:
            raise _Failed(error) from error
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise _Crashed("disk_full", "No space is left on the worker's disk.") from error
            logger.exception("Attempt %s met an unexpected error.", self.run_name)
            message = "The worker met an unexpected error; its log has the details."
            raise _Crashed("worker_error", message) from error
        finally:
            self._flush()

    # --- before the training ---------------------------------------------------------------------------

    def _time_limit(self, job: Job) -> float | None:
        """When the job's `max_seconds` will be used up, earlier attempts included; monotonic."""
        limit = job.options.get("max_seconds")
        if limit is None:
            return None
        earlier = select(func.sum(AttemptRow.ended_at - AttemptRow.started_at)).where(
            AttemptRow.job_id == job.id, AttemptRow.attempt < self.claim.attempt
        )
        used = self._ask(lambda session: session.scalar(earlier)) or 0.0
        return time.monotonic() + float(limit) - used

    def _check_devices(self, job: Job) -> None:
        asked, own = job.options.get("devices", 1), self.settings.devices_per_worker
        if asked > own:
            message = (
                f"olora.devices = {asked}, and the workers of this service own {own} each; ask for fewer, or "
                "have its operator raise OLORA_DEVICES_PER_WORKER."
            )
            raise _Failed(StoreError(message, param="olora.devices", code="too_many_devices"))

    def _fetch(self, job: Job) -> Order:
        """Brings the base model and the files to this machine."""
        claim = self.claim
        base = fetch_base(find_base(self.settings, claim.spec.model), self.settings)
        training = self._fetch_file(job.training_file, claim.training_key, "training")
        validation = None
        if job.validation_file:
            validation = self._fetch_file(job.validation_file, claim.validation_key, "validation")
        return Order(
            run=self.run_name,
            spec=claim.spec.model_dump(mode="json"),
            base=str(base),
            training=str(training),
            validation=str(validation) if validation else None,
            folder=str(self.folder / "work"),
            resume=None,
            checkpoint_seconds=self.settings.checkpoint_seconds,
            deadline=self.lease.trainer_deadline,
            tokens=tokens_folder(self.settings, claim.project_id),
            devices=job.options.get("devices", 1),
            kind=claim.kind.name,
        )

    def _fetch_file(self, file_id: str, key: str | None, role: str) -> Path:
        """Named by its id, which is what a comparison's report calls it."""
        if not key or not self.storage.exists(key):
            again = f"create a new {self.claim.kind.word}"
            message = f"The {role} file is no longer stored; upload it again and {again}."
            raise _Failed(StoreError(message, param=f"{role}_file", code=f"invalid_{role}_file"))
        path = self.folder / role / file_id
        path.parent.mkdir()
        self.storage.fetch(key, path)
        return path

    def _checkpoints(self) -> Iterator[Path | None]:
        """The stored checkpoints, the furthest first, and at last None: from the start.

        One whose bytes are not what was stored is passed over. Whoever asks for the next one has refused
        the one before.
        """
        stored = self._ask(lambda session: progress.stored_checkpoints(session, self.claim.job_id))
        for position, checkpoint in enumerate(stored):
            path = self.folder / f"resume-{position}"
            if self._verifies(checkpoint, path):
                yield path
            before = stored[position + 1 :]
            onward = f"the one before, at step {before[0].step}" if before else "the start"
            self._note(
                "warn",
                f"The checkpoint at step {checkpoint.step} cannot be used; "
                f"the {self.claim.kind.word} goes on from {onward}.",
                {"step": checkpoint.step, "reason": self._refusal},
            )
        yield None

    def _verifies(self, checkpoint: Checkpoint, path: Path) -> bool:
        assert checkpoint.storage_key is not None
        try:
            self.storage.fetch_folder(checkpoint.storage_key, path)
        except StorageError as error:
            self._refusal = error.message
            return False
        return True

    # --- the training ----------------------------------------------------------------------------------

    def _train(self, order: Order) -> dict[str, Any]:
        """Returns the trainer's `Finished` or `Compared`."""
        for resume in self._checkpoints():
            try:
                return self._drive(dataclasses.replace(order, resume=str(resume) if resume else None))
            except CheckpointError as error:
                self._refusal = error.message
                if resume is None:
                    raise
        raise AssertionError("the start can always be tried")

    def _drive(self, order: Order) -> dict[str, Any]:
        if self._wish is not None:
            raise _Stopped(self._wish)
        Path(order.folder).mkdir(exist_ok=True)
        self.trainer.say(dataclasses.replace(order, deadline=self.lease.trainer_deadline).as_message())
        if self._wish is not None:  # it may have come before the trainer knew of this attempt
            self._tell_wish(self._wish)
        heard_at = time.monotonic()
        while True:
            message = self._next_message()
            self._look_up()
            if message is not None:
                heard_at = time.monotonic()
                finished = self._hear(message)
                if finished is not None:
                    return finished
            elif time.monotonic() > heard_at + self.settings.stall_seconds:
                silence = f"The training process said nothing for {self.settings.stall_seconds:g} s."
                raise _Crashed("stalled", silence)
            if time.monotonic() > self._recorded_at + RECORD_SECONDS:
                self._flush(hold_newest=self._newest_may_grow())

    def _next_message(self) -> dict[str, Any] | Ended | None:
        try:
            return self.trainer.messages.get(timeout=LISTEN_SECONDS)
        except queue.Empty:
            return None

    def _look_up(self) -> None:
        """Between two messages: what else may end this attempt?"""
        now = time.monotonic()
        if self.lease.lost:
            raise LeaseLost(self.claim.job_id, self.claim.attempt)
        if self.shutdown.stopping and self._wish is None:
            self._tell_wish("release")
        patience = CANCEL_SECONDS if self._wish == "cancel" else RELEASE_SECONDS
        nothing_to_save = self._wish == "release" and not self._stepped
        if self._wish is not None and (nothing_to_save or now > self._wished_at + patience):
            self._stop_now(self._wish)
        if self.shutdown.hurrying:
            self._stop_now("release")
        if self._time_up is not None and now > self._time_up:
            self.trainer.kill()
            word = self.claim.kind.word
            message = f"The {word} has used up its max_seconds; a larger limit lets a new {word} go further."
            raise _Failed(StoreError(message, param="olora.max_seconds", code="time_limit"))

    def _stop_now(self, wish: str) -> None:
        self.trainer.kill()
        raise _Stopped(wish)

    def _hear(self, message: dict[str, Any] | Ended) -> dict[str, Any] | None:
        """Takes in one message; returns the trainer's `Finished` or `Compared`."""
        match message:
            case Ended():
                raise _Crashed("trainer_lost", message.sentence)
            case {"progress": said}:
                return self._take_in(said["kind"], said)
            case {"stopped": {"wish": wish}}:
                raise _Stopped(wish)
            case {"crashed": {"message": sentence}}:
                raise _Crashed("trainer_crashed", sentence)
            case {"failed": {"code": CheckpointError.code, "message": sentence}}:
                raise CheckpointError(sentence)
            case {"failed": {"code": code, "message": sentence, "param": param}}:
                raise _Failed(OloraError(sentence, param=param, code=code))
            case {"ready": {"pid": pid, "device": device}}:
                logger.info("Trainer %s is ready on %s.", pid, device)
        return None

    def _take_in(self, kind: str, said: dict[str, Any]) -> dict[str, Any] | None:
        values = {name: value for name, value in said.items() if name != "kind"}
        self._evaluating = kind == "Phase" and values["name"] == "evaluating"
        match kind:
            case "Step":
                self._note_step()
                self._unrecorded.steps.append(values)
            case "ComparedStep":
                self._note_step()
                self._first_compared = self._first_compared or (values["step"], self._stepped_at)
                self._unrecorded.compared = values
            case "RunFinished":
                self._unrecorded.events.append(EndedRun(values))
            case "Evaluated" if values["step"] == 0:
                before = f"Before the training: validation loss={values['loss']:.2f}"
                self._note("info", before, {"loss": values["loss"], "accuracy": values["accuracy"]})
            case "Evaluated":
                self._unrecorded.evaluations.append(values)
            case "Note":
                self._note(**values)
            case "Resolved":
                self._resolved(values)
            case "Samples":
                self._unrecorded.samples = values
            case "Saved":
                self._flush()  # what leads to a checkpoint is recorded before it: nobody will redo it
                folder = Path(values["folder"])
                self._store_checkpoint(values["step"], folder, values["metrics"], values["best_step"])
            case "Finished" | "Compared":
                return values
        return None

    def _note_step(self) -> None:
        if not self._stepped:
            self._recorded_at = -math.inf  # whoever waits for the job sees at once that it trains
        self._stepped, self._stepped_at = True, time.monotonic()

    def _note(self, level: Level, message: str, data: dict[str, Any] | None = None) -> None:
        self._unrecorded.events.append(Note(level, message, data))

    def _resolved(self, said: dict[str, Any]) -> None:
        self._unrecorded.resolved = TrainSpec.model_validate(said["spec"])
        self._unrecorded.total_steps = said["total_steps"]
        if not self.claim.resolved:
            for reason in said["why"]:
                self._note("info", f"Decided: {reason}")

    def _store_checkpoint(
        self, step: int, folder: Path, metrics: dict[str, Any], best_step: int | None
    ) -> None:
        self._saved[step] += 1  # what a row names is not written again
        key = checkpoint_folder(self.claim.job_id, step, self.claim.attempt, self._saved[step])
        try:
            self.storage.put_folder(key, folder)
        except StorageError as error:
            # The run itself is well; the next checkpoint may find the storage well again.
            self._note("warn", f"The checkpoint at step {step} could not be stored. {error.message}")
            return

        def named(session: Session) -> list[str]:
            # A commit whose answer was lost is tried again; it must not be named twice.
            if session.scalar(select(Checkpoint.id).where(Checkpoint.storage_key == key)) is not None:
                return []
            return progress.add_checkpoint(session, self.claim, step, metrics, key, best_step)

        for pruned in self._persist(named):
            self.storage.delete_folder(pruned)
        shutil.rmtree(folder.parent, ignore_errors=True)  # `folder` is alone in it

    # --- after the training ----------------------------------------------------------------------------

    def _publish(self, job: Job, finished: dict[str, Any]) -> None:
        """Stores the result files under names of this attempt; one fenced write makes them the result."""
        self._flush()
        results = self.folder / "results"
        results.mkdir()
        if isinstance(self.claim.spec, TrainSpec):
            self._publish_weights(results, job, self.claim.spec, finished)
        else:
            self._publish_report(results, finished)
        self._remove_strays()

    def _publish_weights(self, results: Path, job: Job, spec: TrainSpec, finished: dict[str, Any]) -> None:
        table = self._ask(lambda session: progress.metrics_csv(session, job.id))
        (results / METRICS_FILE).write_text(table)
        weights_file = WEIGHTS_FILES[spec.adapter.export]
        pack(Path(finished["folder"]), results / weights_file)
        shutil.rmtree(finished["folder"])  # a whole model is large
        events_file = self._write_event_file(results)
        files = self._store_results(results, METRICS_FILE, weights_file, events_file)
        model = fine_tuned.model_name(spec.model, self.settings.organization, job.suffix, job.id)
        self._end(
            lambda session: jobs.succeed(
                session,
                self.claim,
                files=files,
                model=model,
                certificate=finished["certificate"],
                trained_tokens=finished["trained_tokens"],
            )
        )

    def _publish_report(self, results: Path, finished: dict[str, Any]) -> None:
        for name in (PAGE_FILE, REPORT_FILE):
            shutil.copyfile(Path(finished["folder"]) / name, results / name)
        files = self._store_results(results, PAGE_FILE, REPORT_FILE)
        findings = comparisons.findings_of(finished["report"])
        self._end(lambda session: comparisons.succeed(session, self.claim, files=files, findings=findings))

    def _store_results(self, results: Path, *names: str) -> list[jobs.ResultFile]:
        prefix = result_folder(self.claim.job_id, self.claim.attempt)
        self.storage.put_folder(prefix, results)
        return [_result_file(results / name, prefix) for name in names]

    def _write_event_file(self, folder: Path) -> str:
        """TensorBoard's view of the rows, so that it is complete after a crash as well. Returns its name."""
        job_id = self.claim.job_id
        rows = self._ask(lambda session: progress.step_rows(session, job_id))
        moments = self._ask(lambda session: progress.step_moments(session, job_id))
        started = min(moments.values(), default=time.time())
        name = event_file_name(job_id, started)
        with EventFile(folder / name, started) as file:
            for row in rows:
                file.add(row.step, curves(row.values), moments.get(row.step, started))
        return name

    # --- the row ---------------------------------------------------------------------------------------

    def _flush(self, *, hold_newest: bool = False) -> None:
        """Records what was said since the last time; of the steps all but the newest, if that is held.

        One whose evaluation is here already is complete, and not held.
        """
        said, self._unrecorded = self._unrecorded, _Unrecorded()
        evaluated = {evaluation["step"] for evaluation in said.evaluations}
        if hold_newest and said.steps and said.steps[-1]["step"] not in evaluated:
            self._unrecorded.steps.append(said.steps.pop())
        self._recorded_at = time.monotonic()
        if said == _Unrecorded():
            return
        if self.claim.kind is COMPARISON:
            left = self._seconds_left(said.compared)
            self._persist(
                lambda session: comparisons.record(
                    session, self.claim, at=said.compared, events=said.events, seconds_left=left
                )
            )
        else:
            self._persist(
                lambda session: progress.record(
                    session,
                    self.claim,
                    steps=said.steps,
                    evaluations=said.evaluations,
                    events=said.events,
                    resolved=said.resolved,
                    total_steps=said.total_steps,
                    samples=said.samples,
                )
            )

    def _seconds_left(self, newest: dict[str, Any] | None) -> float | None:
        """Of a comparison, by the mean step of this attempt, whatever lay between the steps included."""
        if newest is None or self._first_compared is None:
            return None
        step, moment = self._first_compared
        done = newest["step"] - step
        return (newest["total_steps"] - newest["step"]) * (self._stepped_at - moment) / done if done else None

    def _newest_may_grow(self) -> bool:
        """A step's evaluation is told right after it, and belongs into the same event.

        Only the last step of an epoch, or of the run, has one.
        """
        newest = self._unrecorded.steps[-1] if self._unrecorded.steps else None
        if newest is None or not (newest["epoch"].is_integer() or newest["step"] == newest["total_steps"]):
            return False
        return self._evaluating or time.monotonic() < self._stepped_at + EVALUATION_SECONDS

    def _fail(self, error: OloraError) -> None:
        self._end(lambda session: jobs.fail(session, self.claim, error))
        self._remove_strays()

    def _stopped(self, wish: str) -> None:
        if wish == "cancel":
            self._end(lambda session: jobs.cancelled(session, self.claim))
            self._remove_strays()
        else:
            self._hand_back("released", "The worker was stopped.", crashed=False)

    def _remove_strays(self, attempt: int | None = None) -> None:
        try:
            remove_strays(self.read, self.storage, self.claim.job_id, attempt=attempt)
        except (StorageError, *DATABASE_AWAY):
            logger.warning("Attempt %s could not tidy up the storage.", self.run_name, exc_info=True)

    def _hand_back(self, reason: str, message: str, *, crashed: bool) -> None:
        self._end(
            lambda session: jobs.hand_back(
                session,
                self.claim,
                reason=reason,
                message=message,
                crashed=crashed,
                max_failures=self.settings.max_failures,
            )
        )

    def _end(self, change: Callable[[Session], Job]) -> None:
        """The last write of this attempt."""
        self.lease.stop()
        self._persist(change)

    def _persist(self, change: Callable[[Session], Result]) -> Result:
        return self._insist(self.write, change)

    def _ask(self, question: Callable[[Session], Result]) -> Result:
        return self._insist(self.read, question)

    def _insist(self, sessions: Sessions, work: Callable[[Session], Result]) -> Result:
        """One transaction, tried again while the database is away and the lease holds. Raises LeaseLost."""
        pause = 0.1
        while True:
            if self.lease.lost:
                raise LeaseLost(self.claim.job_id, self.claim.attempt)
            try:
                with sessions.begin() as session:
                    return work(session)
            except DATABASE_AWAY as error:
                logger.warning("The database does not answer; trying again: %s", error.orig)
                time.sleep(pause)
                pause = min(2.0, 2 * pause)

    # --- the lease's thread ----------------------------------------------------------------------------

    def _renew(self) -> str | None:
        with self.write.begin() as session:
            return claims.renew(session, self.claim, self.settings.lease_seconds)

    def _look(self) -> str | None:
        mine = select(Job.stop_request).where(
            Job.id == self.claim.job_id, Job.attempt == self.claim.attempt, Job.status == "running"
        )
        with self.read.begin() as session:
            row = session.execute(mine).one_or_none()
        if row is None:
            raise LeaseLost(self.claim.job_id, self.claim.attempt)
        requested: str | None = row.stop_request
        return requested

    def _tell_deadline(self, deadline: float) -> None:
        self.trainer.say({"lease": {"run": self.run_name, "deadline": deadline}})

    def _tell_wish(self, wish: str) -> None:
        if self._wish != wish:
            self._wish, self._wished_at = wish, time.monotonic()
        self.trainer.say({"wish": {"run": self.run_name, "what": wish}})


def _result_file(path: Path, prefix: str) -> jobs.ResultFile:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return jobs.ResultFile(path.name, path.stat().st_size, digest, f"{prefix}/{path.name}")
