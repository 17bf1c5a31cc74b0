"""Stored folders that no row names: an attempt stores a folder first, and names it in a row afterwards."""

import re

from sqlalchemy import select
from sqlalchemy.orm import Session

from store.checkpoints import REDUCED
from store.models import Checkpoint, File, Job
from store.session import Sessions
from store.storage import Storage


def checkpoint_folder(job_id: str, step: int, attempt: int, copy: int) -> str:
    """Where a checkpoint is stored; `copy` counts an attempt's checkpoints of the same step from 1."""
    name = f"{step}-a{attempt}" if copy == 1 else f"{step}-a{attempt}-{copy}"
    return f"jobs/{job_id}/checkpoints/{name}"


def result_folder(job_id: str, attempt: int) -> str:
    return f"jobs/{job_id}/results/a{attempt}"


def remove_strays(read: Sessions, storage: Storage, job_id: str, *, attempt: int | None = None) -> None:
    """Removes the job's stored folders that no row names.

    Call it while holding the job's lease, or once the job has ended. An attempt that lost its lease gives its
    number as `attempt`, and removes only its own folders. What the dispatcher stores, which reduces the
    checkpoints of an ended job, is never a stray.
    """
    stored = {key.rpartition("/")[0] for key in storage.list(f"jobs/{job_id}")}
    stored = {folder for folder in stored if not folder.endswith(REDUCED)}
    if attempt is not None:
        stored = {folder for folder in stored if re.search(rf"[-/]a{attempt}(-\d+)?$", folder)}
    if stored:
        with read.begin() as session:
            named = _named(session, job_id)
        for folder in stored - named:
            storage.delete_folder(folder)


def _named(session: Session, job_id: str) -> set[str]:
    checkpoints = select(Checkpoint.storage_key).where(
        Checkpoint.job_id == job_id, Checkpoint.storage_key.is_not(None)
    )
    results = session.scalar(select(Job.result_files).where(Job.id == job_id)) or []
    files = select(File.storage_key).where(File.id.in_(results), File.storage_key.is_not(None))
    folders = {str(key) for key in session.scalars(checkpoints)}
    return folders | {str(key).rpartition("/")[0] for key in session.scalars(files)}
