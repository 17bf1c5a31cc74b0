"""What a killed attempt left in the storage without any row naming it."""

from sqlalchemy import select
from sqlalchemy.orm import Session

from store.files import Storage
from store.models import Checkpoint, File, Job
from store.session import Sessions


def remove_strays(read: Sessions, storage: Storage, job_id: str) -> None:
    """Removes the job's stored folders that no row names.

    Only for whoever holds the job, or once it has ended: an attempt stores before it names.
    """
    stored = {key.rpartition("/")[0] for key in storage.list(f"jobs/{job_id}")}
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
