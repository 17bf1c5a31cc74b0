"""The service without its web front: rows, storage and files as the API would make them."""

import io
import json
import shutil
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from olora_core.formats import validate
from olora_core.specs import read_comparison, read_spec
from store import control, jobs, progress
from store.checkpoints import REDUCED
from store.files import file_key, new_file_id, record_file
from store.models import Attempt, Checkpoint, Event, File, Job, Metric, Project
from store.session import Sessions, make_engine, sessions
from store.settings import Settings, read_settings
from store.statuses import ENDED
from store.storage import Storage, storage
from tests.rows import chat_file
from tests.services import wait_until

PROJECT = "default"
HELD_OUT = chat_file(10, first=100)
MEASURES = ("second", "memory", "file")
WAIT_SECONDS = 90.0


def service_settings(home: Path, models_dir: Path, template: Path | None = None, **given: Any) -> Settings:
    """Settings with everything in `home`; the database is a copy of `template` unless `given` names one."""
    home.mkdir(exist_ok=True)
    if template is not None:
        shutil.copyfile(template, home / "olora.db")
    chosen = {
        "database_url": f"sqlite:///{home / 'olora.db'}",
        "broker_url": f"folder://{home / 'queue'}",
        "storage_url": f"file://{home / 'storage'}",
        "checkpoint_seconds": 0.3,
    }
    return read_settings(home=home, models_dir=models_dir, **(chosen | given))


@dataclass
class Service:
    settings: Settings

    @cached_property
    def engine(self) -> Engine:
        return make_engine(self.settings.database_url)

    @cached_property
    def write(self) -> Sessions:
        return sessions(self.engine)

    @cached_property
    def storage(self) -> Storage:
        return storage(self.settings)

    def upload(self, data: bytes, project: str = PROJECT, purpose: str = "fine-tune") -> str:
        """A file; a training file is checked as an upload is. Returns its id."""
        file_id = new_file_id()
        with self.storage.writer(file_key(file_id)) as writer:
            writer.write(data)
        with self.write.begin() as session:
            if session.get(Project, project) is None:
                session.add(Project(id=project, name=project))
                session.flush()
            record_file(
                session,
                file_id=file_id,
                project_id=project,
                filename="data.jsonl",
                purpose=purpose,
                bytes=writer.bytes,
                sha256=writer.sha256,
                report=validate(io.BytesIO(data)).model_dump(mode="json") if purpose == "fine-tune" else None,
            )
        return file_id

    def submit(
        self,
        *,
        rows: int = 64,
        data: bytes | None = None,
        validation: bytes | None = None,
        model: str = "tiny",
        options: dict[str, Any] | None = None,
        integrations: list[Any] | None = None,
        project: str = PROJECT,
        type: str = "supervised",
        adapter: dict[str, Any] | None = None,
        former: dict[str, str] | None = None,
        **hyperparameters: Any,
    ) -> str:
        """A job in `validating_files`. Returns its id."""
        training = self.upload(data or chat_file(rows), project)
        held_out = self.upload(validation, project) if validation else None
        asked = {"batch_size": 4, "n_epochs": 2, "samples": 0, **hyperparameters}
        spec = read_spec(model=model, type=type, hyperparameters=asked, adapter=adapter, seed=7)
        with self.write.begin() as session:
            job = jobs.create(
                session,
                project_id=project,
                spec=spec,
                training_file=_row(session, File, training),
                validation_file=_row(session, File, held_out) if held_out else None,
                options=options,
                integrations=integrations,
            )
            for column, value in (former or {}).items():
                setattr(job, column, value)
            return job.id

    def submit_comparison(
        self,
        *,
        rows: int = 48,
        methods: Sequence[str] = ("olora", "lora"),
        options: dict[str, Any] | None = None,
        project: str = PROJECT,
        model: str = "tiny",
        **hyperparameters: Any,
    ) -> str:
        """A comparison of two methods at two rates with two seeds, in `validating_files`. Returns its id."""
        training, held_out = self.upload(chat_file(rows), project), self.upload(HELD_OUT, project)
        spec = read_comparison(
            model=model,
            methods=methods,
            learning_rates=[1e-3, 1e-2],
            hyperparameters={"batch_size": 4, "n_epochs": 2, "dtype": "float32", **hyperparameters},
            seeds=2,
            seed=7,
        )
        with self.write.begin() as session:
            return jobs.create(
                session,
                project_id=project,
                spec=spec,
                training_file=_row(session, File, training),
                validation_file=_row(session, File, held_out),
                options=options,
            ).id

    def admit(self) -> None:
        with self.write.begin() as session:
            jobs.admit(session, self.settings)

    def queue(self, **options: Any) -> str:
        """A job that can be claimed."""
        job_id = self.submit(**options)
        self.admit()
        return job_id

    def queue_comparison(self, **options: Any) -> str:
        """A comparison that can be claimed."""
        comparison_id = self.submit_comparison(**options)
        self.admit()
        return comparison_id

    def cancel(self, job_id: str) -> None:
        with self.write.begin() as session:
            control.cancel(session, _row(session, Job, job_id))

    def pause(self, job_id: str) -> Job:
        with self.write.begin() as session:
            return control.pause(session, _row(session, Job, job_id), self.settings)

    def resume(self, job_id: str, **limits: Any) -> Job:
        with self.write.begin() as session:
            return control.resume(session, _row(session, Job, job_id), limits)

    def job(self, job_id: str) -> Job:
        with self.write() as session:
            return _row(session, Job, job_id)

    def events(self, job_id: str) -> Sequence[Event]:
        """All of them, oldest first."""
        with self.write() as session:
            rows = select(Event).where(Event.job_id == job_id).order_by(Event.seq)
            return session.scalars(rows).all()

    def warnings(self, job_id: str) -> list[str]:
        return [event.message for event in self.events(job_id) if event.level == "warn"]

    def checkpoints(self, job_id: str) -> Sequence[Checkpoint]:
        """Those that are stored, the furthest first."""
        with self.write() as session:
            return progress.stored_checkpoints(session, job_id)

    def attempts(self, job_id: str) -> Sequence[Attempt]:
        with self.write() as session:
            rows = select(Attempt).where(Attempt.job_id == job_id).order_by(Attempt.attempt)
            return session.scalars(rows).all()

    def losses(self, job_id: str) -> list[float]:
        """The training loss of each step, in order, with no step missing and none twice."""
        with self.write() as session:
            rows = session.scalars(select(Metric).where(Metric.job_id == job_id).order_by(Metric.step)).all()
        assert [row.step for row in rows] == list(range(1, len(rows) + 1))
        return [row.values["train_loss"] for row in rows]

    def result(self, job_id: str, position: int) -> bytes:
        """The bytes of a result file."""
        with self.write() as session:
            file = _row(session, File, self.job(job_id).result_files[position])
        assert file.storage_key is not None
        with self.storage.open(file.storage_key) as stored:
            return stored.read()

    def report(self, comparison_id: str) -> Any:
        """A succeeded comparison's report, but for what every try has of its own."""
        return _without_measures(json.loads(self.result(comparison_id, 1)))

    def adapter(self, job_id: str) -> dict[str, bytes]:
        """The files of a succeeded job's adapter, or model."""
        with zipfile.ZipFile(io.BytesIO(self.result(job_id, 1))) as archive:
            return {name: archive.read(name) for name in archive.namelist()}

    def tensors(self, job_id: str) -> bytes:
        return self.adapter(job_id)["adapter_model.safetensors"]

    def traces(self, job_id: str) -> str:
        """Everything that the rows and the storage hold of a job, to see that nothing changed."""
        job = self.job(job_id)
        row = {column.key: getattr(job, column.key) for column in Job.__mapper__.column_attrs}
        events = [event.id for event in self.events(job_id)]
        return json.dumps([row, events, self.storage.list(f"jobs/{job_id}")], default=str, sort_keys=True)

    def traces_at_rest(self, job_id: str) -> str:
        """The traces of an ended job, after the worker and the dispatcher have tidied its storage.

        The worker removes the folders that no row names, the dispatcher the files that only resuming needs.
        """

        def at_rest() -> bool:
            kept = {str(checkpoint.storage_key) for checkpoint in self.checkpoints(job_id)}
            stored = {key.rpartition("/")[0] for key in self.storage.list(f"jobs/{job_id}/checkpoints")}
            return stored == kept and all(key.endswith(REDUCED) for key in kept)

        wait_until(at_rest, "the tidying of the job's storage")
        return self.traces(job_id)

    def wait(
        self, job_id: str, reached: Callable[[Job], object], what: str, seconds: float = WAIT_SECONDS
    ) -> Job:
        """The job once it is so."""
        deadline = time.monotonic() + seconds
        while not reached(job := self.job(job_id)):
            if time.monotonic() > deadline:
                told = "\n".join(f"{e.level}: {e.message}" for e in self.events(job_id)[-10:])
                raise AssertionError(f"{what}: not within {seconds:g} s. The job is {job.status}.\n{told}")
            time.sleep(0.02)
        return job

    def wait_for_end(self, job_id: str) -> Job:
        return self.wait(job_id, lambda job: job.status in ENDED, "the end of the job")

    def wait_for_step(self, job_id: str, step: int) -> Job:
        return self.wait(job_id, lambda job: job.step >= step, f"step {step}")

    def wait_for_checkpoint(self, job_id: str, count: int = 1) -> Job:
        return self.wait(job_id, lambda _: len(self.checkpoints(job_id)) >= count, f"{count} checkpoints")


def _row(session: Session, kind: Any, row_id: str) -> Any:
    row = session.scalar(select(kind).where(kind.id == row_id))
    assert row is not None
    return row


def _without_measures(value: Any) -> Any:
    """The same without what tells of time and memory, and of the files' ids."""
    if isinstance(value, list):
        return [_without_measures(item) for item in value]
    if isinstance(value, dict):
        kept = {name: item for name, item in value.items() if not any(word in name for word in MEASURES)}
        return {name: _without_measures(item) for name, item in kept.items()}
    return value


def exists(pid: int) -> bool:
    """Whether the process runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
