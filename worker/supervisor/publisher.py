"""Stores what an attempt produces, checkpoints and results, and names it in the rows.

The bytes are stored first, under keys of this attempt; one fenced write then makes them the job's.
"""

import hashlib
import shutil
import time
from abc import ABC, abstractmethod
from collections import Counter
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from olora_core.specs import TrainSpec
from store import checkpoints, comparisons, endings, fine_tuned, jobs, progress
from store.claims import Claim
from store.errors import StorageError
from store.kinds import FINE_TUNING
from store.models import Checkpoint, Job
from store.settings import Settings
from store.storage import Storage

from ..tracking.curves import EventFile, curves, event_file_name
from .archive import pack
from .fenced import FencedSessions
from .recorder import Recorder
from .strays import checkpoint_folder, result_folder

METRICS_FILE = "step_metrics.csv"
WEIGHTS_FILES = {"adapter": "adapter.zip", "merged": "model.zip"}
"""By the spec's `export`."""
PAGE_FILE, REPORT_FILE = "comparison.html", "comparison.json"


class Publisher(ABC):
    """Stores in `storage`, by way of the attempt's `folder`. Raises StorageError and LeaseLost."""

    def __init__(
        self,
        fenced: FencedSessions,
        recorder: Recorder,
        *,
        settings: Settings,
        storage: Storage,
        folder: Path,
    ) -> None:
        self.fenced = fenced
        self.claim = fenced.claim
        self.recorder = recorder
        self.settings = settings
        self.storage = storage
        self.folder = folder
        self._saved: Counter[int] = Counter()

    def store_checkpoint(self, folder: Path, saved: dict[str, Any]) -> None:
        """Stores and removes a checkpoint's `folder`; `saved` are the fields of the trainer's `Saved`.

        One that cannot be stored is a warning to the owner.
        """
        self.recorder.flush()  # whoever resumes from here does not repeat what came before
        step = saved["step"]
        self._saved[step] += 1  # a row may name the earlier copy: it is not overwritten
        key = checkpoint_folder(self.claim.job_id, step, self.claim.attempt, self._saved[step])
        try:
            self.storage.put_folder(key, folder)
        except StorageError as error:
            # The training itself is fine, and the storage may be again at the next checkpoint.
            self.recorder.note("warn", f"The checkpoint at step {step} could not be stored. {error.message}")
            return
        for pruned in self.fenced.write(_add_checkpoint, saved, key, self.settings):
            self.storage.delete_folder(pruned)
        shutil.rmtree(folder.parent, ignore_errors=True)  # `folder` is alone in it

    def publish(self, job: Job, finished: dict[str, Any]) -> Job:
        """Ends the job as succeeded, with the results of the trainer's `Finished` or `Compared`.

        Returns its row, which says otherwise if it was paused or cancelled meanwhile.
        """
        self.recorder.flush()
        results = self.folder / "results"
        results.mkdir()
        return self._publish(job, finished, results)

    @abstractmethod
    def _publish(self, job: Job, finished: dict[str, Any], results: Path) -> Job:
        """Makes the result files in the empty folder `results`, stores them and ends the job."""

    def _store(self, results: Path, *names: str) -> list[endings.ResultFile]:
        prefix = result_folder(self.claim.job_id, self.claim.attempt)
        self.storage.put_folder(prefix, results)
        return [_result_file(results / name, prefix) for name in names]


class FineTuningPublisher(Publisher):
    """The metrics, the adapter or model, and TensorBoard's event file."""

    def _publish(self, job: Job, finished: dict[str, Any], results: Path) -> Job:
        spec = self.claim.spec
        assert isinstance(spec, TrainSpec)
        (results / METRICS_FILE).write_text(self.fenced.read(progress.metrics_csv, job.id))
        weights_file = WEIGHTS_FILES[spec.adapter.export]
        pack(Path(finished["folder"]), results / weights_file)
        shutil.rmtree(finished["folder"])  # a whole model is large
        events_file = self._write_event_file(results)
        return self.fenced.end(
            endings.succeed,
            files=self._store(results, METRICS_FILE, weights_file, events_file),
            model=fine_tuned.name_of(job, self.settings.organization),
            certificate=finished["certificate"],
            trained_tokens=finished["trained_tokens"],
        )

    def _write_event_file(self, folder: Path) -> str:
        """Returns its name. Written from the rows, it also has the steps of earlier attempts."""
        job_id = self.claim.job_id
        rows = self.fenced.read(progress.step_rows, job_id)
        moments = self.fenced.read(progress.step_moments, job_id)
        started = min(moments.values(), default=time.time())
        name = event_file_name(job_id, started)
        with EventFile(folder / name, started) as file:
            for row in rows:
                file.add(row.step, curves(row.values), moments.get(row.step, started))
        return name


class ComparisonPublisher(Publisher):
    """The page and the report."""

    def _publish(self, job: Job, finished: dict[str, Any], results: Path) -> Job:
        for name in (PAGE_FILE, REPORT_FILE):
            shutil.copyfile(Path(finished["folder"]) / name, results / name)
        return self.fenced.end(
            comparisons.succeed,
            files=self._store(results, PAGE_FILE, REPORT_FILE),
            findings=comparisons.findings_of(finished["report"]),
        )


class ExportPublisher(Publisher):
    """A checkpoint's adapter or model."""

    def _publish(self, job: Job, finished: dict[str, Any], results: Path) -> Job:
        spec = self.claim.spec
        assert isinstance(spec, TrainSpec)
        weights_file = WEIGHTS_FILES[spec.adapter.export]
        pack(Path(finished["folder"]), results / weights_file)
        shutil.rmtree(finished["folder"])  # a whole model is large
        return self.fenced.end(
            checkpoints.succeed,
            files=self._store(results, weights_file),
            certificate=finished["certificate"],
        )


def _add_checkpoint(
    session: Session, claim: Claim, saved: dict[str, Any], key: str, settings: Settings
) -> list[str]:
    # A commit whose answer was lost is repeated; the second time must not add a second row.
    if session.scalar(select(Checkpoint.id).where(Checkpoint.storage_key == key)) is not None:
        return []
    job = jobs.get_job(session, claim.project_id, claim.job_id, claim.kind)
    named = f"{fine_tuned.name_of(job, settings.organization)}:ckpt-step-{saved['step']}"
    is_job = claim.kind is FINE_TUNING
    pruned = progress.add_checkpoint(
        session,
        claim,
        saved["step"],
        saved["metrics"],
        key,
        saved["best_step"],
        epoch=saved["epoch"] if is_job else None,
        model=named,
        kept_epochs=settings.kept_epochs if is_job else 0,
    )
    if settings.export_checkpoints == "at_epoch_end" and saved["epoch"] is not None and is_job:
        made = session.scalars(select(Checkpoint).where(Checkpoint.storage_key == key)).one_or_none()
        if made is not None and made.model is not None:
            checkpoints.request_export(session, made)
    return pruned


def _result_file(path: Path, prefix: str) -> endings.ResultFile:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return endings.ResultFile(path.name, path.stat().st_size, digest, f"{prefix}/{path.name}")
