"""Fine-tuned models: names for what succeeded jobs have trained."""

import re
from collections.abc import Sequence

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from .checkpoints import delete_checkpoints
from .errors import FileInUse, NotFound
from .models import Checkpoint, File, Job, Model
from .session import db_now, settle
from .statuses import UNFINISHED


def name_of(job: Job, organization: str) -> str:
    """The name of the model that a job makes: of what it trains on from, the base's part stays."""
    base = job.model
    if job.former_model is not None:
        base = job.former_model.split(":")[1] if job.former_model.startswith("ft:") else job.spec["model"]
    return model_name(base, organization, job.suffix, job.id)


def model_name(base: str, organization: str, suffix: str | None, job_id: str) -> str:
    """`ft:<base>:<organization>:<suffix or empty>:<8 characters of the job's id>`, without a slash.

    Known as soon as the job exists, so that its checkpoints can be named after it.
    """
    return f"ft:{slug(base)}:{organization}:{slug(suffix or '')}:{job_id[-8:]}"


def slug(text: str) -> str:
    """`meta-llama/Llama-3.2-1B` → `meta-llama--llama-3.2-1b`"""
    return re.sub(r"[^a-z0-9._-]+", "-", text.replace("/", "--").lower())


def list_models(session: Session, project_id: str) -> Sequence[Model]:
    """The project's fine-tuned models, newest first."""
    rows = select(Model).where(Model.project_id == project_id, Model.deleted_at.is_(None))
    return session.scalars(rows.order_by(Model.seq.desc())).all()


def get_model(session: Session, project_id: str, model_id: str) -> Model:
    """Raises NotFound, also for another project's model and for a deleted one."""
    rows = select(Model).where(
        Model.id == model_id, Model.project_id == project_id, Model.deleted_at.is_(None)
    )
    model = session.scalar(rows)
    if model is None:
        raise NotFound(f"The model '{model_id}' does not exist.", param="model", code="model_not_found")
    return model


def delete_model(session: Session, project_id: str, model_id: str) -> Model:
    """Deletes the model, the file with its weights and the checkpoints of its job; the job stays.

    Raises NotFound, and FileInUse while a job trains on from it or from one of these checkpoints.
    """
    model = get_model(session, project_id, model_id)
    require_unused(session, project_id, model_id)
    for checkpoint in session.scalars(select(Checkpoint.model).where(Checkpoint.job_id == model.job_id)):
        require_unused(session, project_id, checkpoint)
    model.deleted_at = db_now()
    job = session.scalar(select(Job).where(Job.id == model.job_id))
    weights = job.result_files[1:2] if job else []
    session.execute(
        update(File).where(File.id.in_(weights), File.deleted_at.is_(None)).values(deleted_at=db_now())
    )
    delete_checkpoints(session, Checkpoint.job_id == model.job_id)
    settle(session, model)
    return model


def require_unused(session: Session, project_id: str, name: str | None) -> None:
    """Raises FileInUse while an unfinished job trains on from the model."""
    using = select(Job.id).where(
        Job.project_id == project_id, Job.former_model == name, Job.status.in_(UNFINISHED)
    )
    job_id = None if name is None else session.scalar(using.limit(1))
    if job_id is not None:
        raise FileInUse(
            f"Job {job_id} trains on from the model '{name}'; wait until it ends or cancel it first.",
            param="model",
        )
