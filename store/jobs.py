"""Jobs: created, admitted, found. Each transition is one short transaction.

The row is the only truth. `claims.py` says who works on a job, `progress.py` what is recorded meanwhile,
`control.py` what its owner may ask for, `endings.py` how it ends. Comparisons share this life cycle; what
only they have is in `comparisons.py`.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

from sqlalchemy import and_, func, select
from sqlalchemy.orm import Session

from olora_core.errors import OloraError
from olora_core.formats import Report, check_for_training
from olora_core.progress import Note

from .endings import end_failed, enqueue, error_dict
from .errors import FileUnusable, NotFound, StoreError
from .events import add_notes
from .files import lock_file
from .kinds import FINE_TUNING, KINDS, Kind, Work, kind_for
from .models import File, Job, new_id
from .pages import RowPage, read_page
from .settings import Settings


def create(
    session: Session,
    *,
    project_id: str,
    spec: Work,
    training_file: File,
    validation_file: File | None = None,
    model: str | None = None,
    suffix: str | None = None,
    metadata: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
    integrations: list[Any] | None = None,
    seed: int | None = None,
    notes: Sequence[Note] = (),
) -> Job:
    """Creates a job or comparison in `validating_files`. `model` is the name that was asked for, by
    default the base's; `seed` defaults to the spec's; `notes` are events.

    Raises NotFound if a file has been deleted meanwhile, FileUnusable if it is not a training file.
    """
    for file, param in ((training_file, "training_file"), (validation_file, "validation_file")):
        if file is not None:
            _check_purpose(file, param)
            lock_file(session, file)
    seed = spec.seed if seed is None else seed
    kind = kind_for(spec)
    job = Job(
        id=new_id(kind.prefix),
        project_id=project_id,
        kind=kind.name,
        status="validating_files",
        model=model or spec.model,
        training_file=training_file.id,
        validation_file=validation_file.id if validation_file else None,
        suffix=suffix,
        seed=seed,
        job_metadata=metadata,
        spec=spec.model_copy(update={"seed": seed}).model_dump(mode="json"),
        options=options or {},
        integrations=integrations,
    )
    session.add(job)
    session.flush()
    checked = f"Validating training file: {training_file.id}"
    if validation_file:
        checked += f" and validation file: {validation_file.id}"
    add_notes(session, job.id, Note("info", f"Created {kind.noun}: {job.id}"), Note("info", checked), *notes)
    return job


def _check_purpose(file: File, param: str) -> None:
    if file.purpose != "fine-tune":
        raise FileUnusable(
            f"File {file.id} has purpose {file.purpose!r}; upload it with purpose 'fine-tune'.",
            param=param,
            code=f"invalid_{param}",
        )


def admit(session: Session, settings: Settings) -> int:
    """Moves jobs from `validating_files` to `queued`, or to `failed`, according to their files' reports.

    The columns of a job that maps them are checked by its worker.
    Returns how many it moved.
    """
    waiting = select(Job).where(Job.status == "validating_files").order_by(Job.seq).limit(100)
    jobs = session.scalars(waiting.with_for_update(skip_locked=True)).all()
    for job in jobs:
        admit_one(session, job, settings)
    session.flush()
    return len(jobs)


def admit_one(session: Session, job: Job, settings: Settings) -> None:
    """Moves a job out of `validating_files`; one that is not to start by itself is paused."""
    error = _file_error(session, job, settings)
    if error is not None:
        end_failed(session, job, error_dict(error))
        return
    word = KINDS[job.kind].word
    if job.options.get("auto_start", True):
        enqueue(job)
        add_notes(session, job.id, Note("info", f"Files validated, moving {word} to queued state"))
    else:
        job.status, job.pause_reason = "paused", "auto_start"
        add_notes(session, job.id, Note("info", f"Files validated; the {word} starts when it is resumed"))


def _file_error(session: Session, job: Job, settings: Settings) -> OloraError | None:
    training = _report_of(session, job.training_file, "training_file")
    if not isinstance(training, Report):
        return training
    check = partial(
        check_for_training,
        type=job.spec["type"],
        literal=job.spec["hyperparameters"].get("control_tokens") == "text",
        is_mapped=bool(job.spec.get("columns")),
    )
    error = check(training, role="training", minimum_rows=settings.min_examples)
    if error is not None or job.validation_file is None:
        return error
    validation = _report_of(session, job.validation_file, "validation_file")
    if not isinstance(validation, Report):
        return validation
    return check(validation, role="validation", minimum_rows=1, training_format=training.format)


def _report_of(session: Session, file_id: str, param: str) -> Report | StoreError:
    file = session.scalar(select(File).where(File.id == file_id))
    code = f"invalid_{param}"
    if file is None or file.deleted_at is not None:
        return FileUnusable(f"File {file_id} has been deleted; upload it again.", param=param, code=code)
    if file.report is None:
        return FileUnusable(
            f"File {file_id} was not checked as training data; upload it with purpose 'fine-tune'.",
            param=param,
            code=code,
        )
    return Report.model_validate(file.report)


def get_job(session: Session, project_id: str, job_id: str, kind: Kind = FINE_TUNING) -> Job:
    """Raises NotFound, also for another project's job and for one of another kind."""
    job = session.scalar(
        select(Job).where(Job.id == job_id, Job.project_id == project_id, Job.kind == kind.name)
    )
    if job is None:
        raise NotFound(f"No such {kind.noun}: {job_id}.", param=kind.param)
    return job


def leaves_model(job: Job) -> bool:
    """Whether the job exports the whole model, with the adapter merged into it."""
    return bool(job.spec["adapter"].get("export") == "merged")


def list_jobs(
    session: Session,
    project_id: str,
    *,
    kind: Kind = FINE_TUNING,
    metadata: Mapping[str, str] | Literal["null"] | None = None,
    after: str | None = None,
    limit: int = 20,
) -> RowPage[Job]:
    """Jobs of one kind, newest first: those with all pairs of `metadata`, or, if "null", without any."""
    rows = select(Job)
    if metadata == "null":
        rows = rows.where(Job.job_metadata.is_(None))
    elif metadata:
        for key, value in metadata.items():
            rows = rows.where(_has_pair(session, key, value))
    within = and_(Job.project_id == project_id, Job.kind == kind.name)
    return read_page(session, rows, Job, within=within, after=after, limit=limit)


def _has_pair(session: Session, key: str, value: str) -> Any:
    each = func.json_each if session.get_bind().dialect.name == "sqlite" else func.json_each_text
    pairs = each(Job.job_metadata).table_valued("key", "value")
    return select(1).select_from(pairs).where(pairs.c.key == key, pairs.c.value == value).exists()
