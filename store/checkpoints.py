"""Checkpoints as models: their names, their adapters, and what is kept of them once their job has ended.

A checkpoint's adapter is exported when it is first asked for, by a worker: the export is a row of the jobs
table, with a job's life cycle, that no list of jobs shows.
"""

import secrets
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import ColumnElement, and_, func, or_, select
from sqlalchemy.orm import Session

from olora_core.progress import Note

from .claims import Claim
from .endings import ResultFile, complete, enqueue
from .errors import NotFound
from .kinds import EXPORT
from .models import Checkpoint, File, Job, new_id
from .session import Sessions, db_now
from .statuses import ENDED
from .storage import Storage

Status = Literal["available", "exporting", "ready", "failed"]
NOT_OF_A_MODEL = ("optimizer.safetensors", "best.safetensors")
"""The files of a checkpoint that only resuming needs."""
EXPORT_PRIORITY = 9
REDUCED = "-model"
"""How the folders of reduced checkpoints end."""


def list_checkpoint_models(session: Session, project_id: str) -> Sequence[Checkpoint]:
    """The project's checkpoints that are models, newest first."""
    mine = select(Job.id).where(Job.project_id == project_id)
    rows = select(Checkpoint).where(_is_model(), Checkpoint.job_id.in_(mine))
    return session.scalars(rows.order_by(Checkpoint.seq.desc())).all()


def get_checkpoint_model(session: Session, project_id: str, name: str) -> Checkpoint:
    """Raises NotFound, also for another project's checkpoint and for one that is no longer kept."""
    mine = select(Job.id).where(Job.project_id == project_id)
    rows = select(Checkpoint).where(_is_model(), Checkpoint.model == name, Checkpoint.job_id.in_(mine))
    checkpoint = session.scalar(rows)
    if checkpoint is None:
        raise NotFound(f"The model '{name}' does not exist.", param="model", code="model_not_found")
    return checkpoint


def get_checkpoint(session: Session, project_id: str, checkpoint_id: str) -> Checkpoint:
    """Raises NotFound, also for another project's checkpoint and for one that is no longer kept."""
    mine = select(Job.id).where(Job.project_id == project_id)
    kept = (Checkpoint.deleted_at.is_(None), Checkpoint.storage_key.is_not(None))
    rows = select(Checkpoint).where(Checkpoint.id == checkpoint_id, Checkpoint.job_id.in_(mine), *kept)
    checkpoint = session.scalar(rows)
    if checkpoint is None:
        raise NotFound(f"No such checkpoint: {checkpoint_id}.", param="checkpoint_id")
    return checkpoint


def _is_model() -> ColumnElement[bool]:
    return and_(
        Checkpoint.model.is_not(None), Checkpoint.storage_key.is_not(None), Checkpoint.deleted_at.is_(None)
    )


def status_of(session: Session, checkpoint: Checkpoint) -> tuple[Status, str | None]:
    """How far a checkpoint's adapter is, and why its export failed."""
    if checkpoint.adapter_file is not None:
        return "ready", None
    if checkpoint.export_job is None:
        return "available", None
    job = session.scalars(select(Job).where(Job.id == checkpoint.export_job)).one()
    if job.status not in ENDED:
        return "exporting", None
    return "failed", (job.error or {}).get("message")


def request_export(session: Session, checkpoint: Checkpoint) -> bool:
    """Has a worker export the checkpoint's adapter, unless it has been or is being exported.

    One whose export failed is exported again. Returns whether there is something new to do.
    """
    row = select(Checkpoint).where(Checkpoint.seq == checkpoint.seq).with_for_update()
    current = session.scalars(row.execution_options(populate_existing=True)).one()
    if status_of(session, current)[0] in ("ready", "exporting"):
        return False
    trained = session.scalars(select(Job).where(Job.id == current.job_id)).one()
    spec = trained.resolved or trained.spec
    export = Job(
        id=new_id(EXPORT.prefix),
        project_id=trained.project_id,
        kind=EXPORT.name,
        status="queued",
        model=current.model or trained.model,
        training_file=trained.training_file,
        seed=trained.seed,
        spec=spec,
        resolved=spec,
        options={"checkpoint": current.id},
        priority=EXPORT_PRIORITY,
    )
    enqueue(export)
    session.add(export)
    current.export_job = export.id
    session.flush()
    return True


def exported_checkpoint(session: Session, export: Job) -> Checkpoint:
    """The checkpoint that an export is of. Raises NotFound once it has been deleted."""
    return get_checkpoint(session, export.project_id, str(export.options["checkpoint"]))


def succeed(
    session: Session, claim: Claim, *, files: Sequence[ResultFile], certificate: dict[str, Any]
) -> Job:
    """Ends an export; the checkpoint has its adapter. Raises LeaseLost."""
    job = complete(session, claim, files, Note("info", "The checkpoint's adapter is exported"))
    checkpoint_id = str(job.options["checkpoint"])
    row = select(Checkpoint).where(Checkpoint.id == checkpoint_id).with_for_update()
    checkpoint = session.scalars(row).one()
    if job.status == "succeeded":
        checkpoint.adapter_file = job.result_files[0]
        checkpoint.certificate = certificate
    session.flush()
    return job


def delete_checkpoints(session: Session, condition: ColumnElement[bool]) -> None:
    """Marks checkpoints and their adapters as deleted; the dispatcher removes their bytes."""
    rows = select(Checkpoint).where(condition, Checkpoint.deleted_at.is_(None))
    for checkpoint in session.scalars(rows.with_for_update()):
        checkpoint.deleted_at = db_now()
        if checkpoint.adapter_file is not None:
            file = session.scalars(select(File).where(File.id == checkpoint.adapter_file)).one()
            file.deleted_at = file.deleted_at or db_now()
    session.flush()


# --- after the end of the job --------------------------------------------------------------------------


def to_finish() -> ColumnElement[bool]:
    """Stored checkpoints that take more room than they need to: deleted, or of a job that cannot go on."""
    ended = select(Job.id).where(Job.status.in_(ENDED), Job.lease_owner.is_(None))
    reducible = and_(Checkpoint.is_final.is_(False), Checkpoint.job_id.in_(ended))
    return and_(Checkpoint.storage_key.is_not(None), or_(Checkpoint.deleted_at.is_not(None), reducible))


def finish_checkpoint(sessions: Sessions, store: Storage, scratch: Path) -> bool:
    """Reduces one checkpoint to what a model needs, or removes it if it is none.

    Returns whether there was one. A failed job's last checkpoint stays too. The bytes are copied first, and
    removed last: a crash in between leaves a folder that no row names.
    """
    with sessions.begin() as session:
        checkpoint = session.scalar(select(Checkpoint).where(to_finish()).order_by(Checkpoint.seq).limit(1))
        if checkpoint is None:
            return False
        is_kept = checkpoint.deleted_at is None and (
            checkpoint.model is not None or _is_last_of_failed(session, checkpoint)
        )
    key = checkpoint.storage_key
    assert key is not None
    reduced = f"{key}-{secrets.token_hex(4)}{REDUCED}"  # another dispatcher may be at it too
    if is_kept:
        with tempfile.TemporaryDirectory(dir=scratch, prefix="checkpoint-") as folder:
            store.fetch_folder(key, Path(folder) / "all")
            for name in NOT_OF_A_MODEL:
                (Path(folder) / "all" / name).unlink(missing_ok=True)
            store.put_folder(reduced, Path(folder) / "all")
    with sessions.begin() as session:
        row = session.get_one(Checkpoint, checkpoint.seq, with_for_update=True)
        is_mine = row.storage_key == key
        if is_mine:
            row.storage_key, row.is_final = reduced if is_kept else None, True
            row.model = row.model if is_kept else None
    if is_mine:
        store.delete_folder(key)
    elif is_kept:
        store.delete_folder(reduced)
    return True


def _is_last_of_failed(session: Session, checkpoint: Checkpoint) -> bool:
    status = session.scalar(select(Job.status).where(Job.id == checkpoint.job_id))
    last = select(func.max(Checkpoint.step)).where(
        Checkpoint.job_id == checkpoint.job_id, Checkpoint.storage_key.is_not(None)
    )
    return status == "failed" and checkpoint.step == session.scalar(last)
