"""The rows of files, kept consistent with their bytes in the storage."""

from typing import Any, Literal

from sqlalchemy import ColumnElement, Text, and_, cast, or_, select
from sqlalchemy.orm import Session

from .errors import FileInUse, NotFound
from .kinds import EXPORT
from .models import Checkpoint, File, Job, Model, new_id
from .pages import RowPage, read_page
from .session import Sessions, db_now, settle
from .statuses import UNFINISHED
from .storage import Storage


def new_file_id() -> str:
    return new_id("file-")


def file_key(file_id: str) -> str:
    """Where a file's bytes are stored."""
    return f"files/{file_id}"


def record_file(
    session: Session,
    *,
    file_id: str,
    project_id: str,
    filename: str,
    purpose: str,
    bytes: int,
    sha256: str,
    report: dict[str, Any] | None = None,
    expires_in: float | None = None,
    storage_key: str | None = None,
) -> File:
    """The row of a file whose bytes are stored. `report` is `formats.Report.model_dump(mode="json")`."""
    file = File(
        id=file_id,
        project_id=project_id,
        filename=filename[:512],
        purpose=purpose,
        bytes=bytes,
        sha256=sha256,
        storage_key=storage_key or file_key(file_id),
        status="processed",
        report=report,
        expires_at=None if expires_in is None else db_now() + expires_in,
    )
    session.add(file)
    session.flush()
    return file


def _alive() -> Any:
    return File.deleted_at.is_(None) & or_(File.expires_at.is_(None), File.expires_at > db_now())


def get_file(session: Session, project_id: str, file_id: str) -> File:
    """Raises NotFound, also for another project's file."""
    file = session.scalar(select(File).where(File.id == file_id, File.project_id == project_id, _alive()))
    if file is None:
        raise NotFound(f"No such file: {file_id}.", param="file_id")
    return file


def list_files(
    session: Session,
    project_id: str,
    *,
    after: str | None = None,
    limit: int = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: str | None = None,
) -> RowPage[File]:
    rows = select(File).where(_alive())
    if purpose is not None:
        rows = rows.where(File.purpose == purpose)
    return read_page(
        session,
        rows,
        File,
        within=File.project_id == project_id,
        after=after,
        limit=limit,
        newest_first=order == "desc",
    )


def delete_file(session: Session, project_id: str, file_id: str) -> File:
    """Marks a file as deleted; `purge_files` removes its bytes after the commit.

    Raises NotFound, and FileInUse while an unfinished job needs it or it holds a model's weights.
    """
    get_file(session, project_id, file_id)
    # Lock before reading the jobs: a job that is being created holds this lock until its row is visible.
    file = session.scalar(select(File).where(File.id == file_id, _alive()).with_for_update())
    if file is None:
        raise NotFound(f"No such file: {file_id}.", param="file_id")
    job_id = session.scalar(select(Job.id).where(_uses(file.id)).limit(1))
    if job_id is not None:
        raise FileInUse(
            f"File {file_id} is in use by job {job_id}; wait until it ends or cancel it first.",
            param="file_id",
        )
    model_id = _model_of(session, file)
    if model_id is not None:
        raise FileInUse(
            f"File {file_id} holds the weights of the model '{model_id}'; delete the model "
            f"instead, which also deletes the file: DELETE /v1/models/{model_id}.",
            param="file_id",
        )
    _mark_deleted(session, file)
    return file


def _model_of(session: Session, file: File) -> str | None:
    """The model whose weights this file holds: the second of its job's result files."""
    named = cast(Job.result_files, Text).contains(file.id, autoescape=True)
    of_checkpoint = select(Checkpoint.model).where(
        Checkpoint.adapter_file == file.id, Checkpoint.deleted_at.is_(None)
    )
    if (name := session.scalar(of_checkpoint)) is not None:
        return name
    rows = select(Model.id, Job.result_files).join(Job, Job.id == Model.job_id)
    rows = rows.where(Model.project_id == file.project_id, Model.deleted_at.is_(None), named)
    return next((model_id for model_id, results in session.execute(rows) if file.id in results[1:2]), None)


def _mark_deleted(session: Session, file: File) -> None:
    file.deleted_at = db_now()
    settle(session, file)


def _uses(file_id: Any) -> Any:
    named = (Job.training_file, Job.validation_file, Job.former_file)
    needs = Job.status.in_(UNFINISHED) & (Job.kind != EXPORT.name)  # an export needs a checkpoint only
    return needs & or_(*(column == file_id for column in named))


def lock_file(session: Session, file: File) -> None:
    """Keeps a file from being deleted until this transaction ends. Raises NotFound if it has been already."""
    held = select(File.seq).where(File.id == file.id, _alive()).with_for_update(read=True)
    if session.scalar(held) is None:
        raise NotFound(f"File {file.id} has been deleted.", param="training_file")


def to_purge() -> ColumnElement[bool]:
    """Deleted or expired, with bytes that are still stored."""
    return and_(File.storage_key.is_not(None), or_(File.deleted_at.is_not(None), File.expires_at <= db_now()))


def purge_files(sessions: Sessions, store: Storage, limit: int = 100) -> int:
    """Marks expired files as deleted, unless a job needs them, and removes the bytes of deleted ones.

    The bytes are removed before the rows say so: if the process dies in between, the next call repeats it.
    """
    with sessions.begin() as session:
        expired = select(File).where(
            File.deleted_at.is_(None),
            File.expires_at <= db_now(),
            ~select(Job.seq).where(_uses(File.id)).exists(),
        )
        for file in session.scalars(expired.limit(limit).with_for_update(skip_locked=True)):
            _mark_deleted(session, file)
    with sessions.begin() as session:
        gone = select(File).where(File.deleted_at.is_not(None), File.storage_key.is_not(None)).limit(limit)
        found = session.scalars(gone).all()
    for file in found:
        assert file.storage_key is not None
        store.delete(file.storage_key)
    with sessions.begin() as session:
        for file in found:
            session.merge(file).storage_key = None
    return len(found)
