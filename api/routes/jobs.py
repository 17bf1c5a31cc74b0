"""Fine-tuning jobs: create, list, retrieve, cancel, pause, resume; their checkpoints and their adapters."""

from fastapi import APIRouter, Request
from sqlalchemy.orm import Session
from starlette.responses import Response

from olora_core.specs import TrainSpec
from store import checkpoints, control, files, jobs, progress
from store.errors import JobStateError
from store.errors import NotFound as NotStored
from store.fine_tuned import name_of
from store.integrations import Integration, read_integrations, require_offered
from store.models import File, Job

from ..deps import After, BodyDep, Call, CallDep, Limit, OptionalBodyDep
from ..downloads import is_current, send_file
from ..errors import Exporting, NotFound
from ..idempotency import once
from ..schemas.bodies import RESUME_SCHEMA, JobOptions, new_limits
from ..schemas.jobs import CheckpointObject, CreateJob, JobObject, read_create, spec_of
from ..schemas.pages import Page
from ..submission import Source, adapter_of, metadata_filter, source_of, usable

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["fine-tuning"])

BODY_SCHEMA = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": CreateJob.model_json_schema()}},
    }
}


@router.post("", openapi_extra=BODY_SCHEMA)
def create_job(body: BodyDep, call: CallDep) -> JobObject:
    """The job is committed before the answer; the dispatcher then checks its files and queues it."""
    request = read_create(body.values)
    options = request.olora or JobOptions()
    trackers = read_integrations(request.integrations or [])
    require_offered(trackers, call.settings)
    source = source_of(call, request.model, options.base)
    spec = spec_of(request, base=source.base, adapter=adapter_of(request.adapter, source))
    made_id, _ = once(
        call,
        "POST /v1/fine_tuning/jobs",
        body.digest,
        lambda session: _make(session, call, request, spec, source, trackers),
    )
    call.nudge()
    return retrieve_job(made_id, call)


def _make(
    session: Session,
    call: Call,
    request: CreateJob,
    spec: TrainSpec,
    source: Source,
    trackers: list[Integration],
) -> str:
    options = request.olora or JobOptions()
    job = jobs.create(
        session,
        project_id=call.project_id,
        spec=spec,
        model=request.model,
        training_file=usable(session, call, request.training_file, "training_file"),
        validation_file=(
            usable(session, call, request.validation_file, "validation_file")
            if request.validation_file is not None
            else None
        ),
        suffix=request.suffix,
        metadata=dict(request.metadata) if request.metadata is not None else None,
        options=options.model_dump(),
        integrations=[tracker.model_dump() for tracker in trackers] or None,
    )
    job.priority = options.priority
    for column, value in source.former.items():
        setattr(job, column, value)
    return job.id


@router.get("")
def list_jobs(request: Request, call: CallDep, after: After = None, limit: Limit = 20) -> Page[JobObject]:
    """Newest first. `metadata[key]=value`, which may be repeated, selects the jobs with all these pairs;
    `metadata=null` selects those without metadata.
    """
    wanted = metadata_filter(request)
    with call.reading() as session:
        page = jobs.list_jobs(session, call.project_id, metadata=wanted, after=after, limit=limit)
        return Page[JobObject].of([_object(row, call) for row in page.data], page.has_more)


@router.get("/{job_id}")
def retrieve_job(job_id: str, call: CallDep) -> JobObject:
    with call.reading() as session:
        return _object(jobs.get_job(session, call.project_id, job_id), call)


@router.post("/{job_id}/cancel")
def cancel_job(job_id: str, call: CallDep) -> JobObject:
    """Ends the job at once; `olora.stopping` is true until its trainer has stopped.

    Cancelling twice is not an error.
    """
    with call.writing() as session:
        return _object(control.cancel(session, jobs.get_job(session, call.project_id, job_id)), call)


@router.post("/{job_id}/pause")
def pause_job(job_id: str, call: CallDep) -> JobObject:
    """Pauses the job at once; `olora.stopping` is true until its trainer has saved a checkpoint and stopped.

    Pausing twice is not an error.
    """
    with call.writing() as session:
        job = jobs.get_job(session, call.project_id, job_id)
        return _object(control.pause(session, job, call.settings), call)


@router.post("/{job_id}/resume", openapi_extra=RESUME_SCHEMA)
def resume_job(job_id: str, body: OptionalBodyDep, call: CallDep) -> JobObject:
    """Queues a paused job, which goes on from its newest checkpoint, bit for bit. Its limits begin anew.

    Resuming a job that is not paused is not an error.
    """
    limits = new_limits(body.values)
    with call.writing() as session:
        job = jobs.get_job(session, call.project_id, job_id)
        resumed = _object(control.resume(session, job, limits), call)
    call.nudge()
    return resumed


@router.get("/{job_id}/checkpoints")
def list_checkpoints(
    job_id: str, call: CallDep, after: After = None, limit: Limit = 10
) -> Page[CheckpointObject]:
    """Those that are kept, newest first: at the ends of epochs, and others while the job can go on."""
    with call.reading() as session:
        job = jobs.get_job(session, call.project_id, job_id)
        page = progress.list_checkpoints(session, job.id, after=after, limit=limit)
        name = name_of(job, call.settings.organization)
        return Page[CheckpointObject].of(
            [CheckpointObject.of(row, name, checkpoints.status_of(session, row)) for row in page.data],
            page.has_more,
        )


@router.get("/{job_id}/checkpoints/{checkpoint_id}/adapter", response_class=Response)
def download_checkpoint(job_id: str, checkpoint_id: str, request: Request, call: CallDep) -> Response:
    """The checkpoint's certified adapter as a zip, exported when it is first asked for.

    Until a worker has done so, the answer is 503 with Retry-After, which the official clients follow.
    """
    with call.writing() as session:
        job = jobs.get_job(session, call.project_id, job_id)
        checkpoint = checkpoints.get_checkpoint(session, call.project_id, checkpoint_id)
        if checkpoint.job_id != job.id:
            raise NotFound(f"Job {job_id} has no checkpoint {checkpoint_id}.", param="checkpoint_id")
        status, problem = checkpoints.status_of(session, checkpoint)
        if status == "failed" and "retry" not in request.query_params:
            raise JobStateError(
                f"The adapter of checkpoint {checkpoint_id} could not be exported: {problem} To try again, "
                "add ?retry=true.",
            )
        asked = checkpoints.request_export(session, checkpoint)
        file_id = checkpoint.adapter_file
    if asked:
        call.nudge()
    if file_id is None:
        raise Exporting(f"A worker is exporting the adapter of checkpoint {checkpoint_id}; ask again soon.")
    with call.reading() as session:
        row = files.get_file(session, call.project_id, file_id)
    if is_current(row, request.headers.get("if-none-match")):
        return Response(status_code=304, headers={"etag": f'"{row.sha256}"'})
    return send_file(call.storage, row)


@router.get("/{job_id}/adapter", response_class=Response)
def download_adapter(job_id: str, request: Request, call: CallDep) -> Response:
    """The certified adapter as a zip. Send its ETag as If-None-Match to download only what has changed."""
    row = _adapter_file(job_id, call)
    if is_current(row, request.headers.get("if-none-match")):
        return Response(status_code=304, headers={"etag": f'"{row.sha256}"'})
    return send_file(call.storage, row)


@router.head("/{job_id}/adapter", include_in_schema=False)
def describe_adapter(job_id: str, call: CallDep) -> Response:
    row = _adapter_file(job_id, call)
    return Response(headers=dict(send_file(call.storage, row).headers))


def _adapter_file(job_id: str, call: Call) -> File:
    with call.reading() as session:
        job = jobs.get_job(session, call.project_id, job_id)
        if job.status != "succeeded" or jobs.leaves_model(job):
            raise JobStateError(_why_no_adapter(job))
        try:
            return files.get_file(session, call.project_id, job.result_files[1])
        except NotStored:
            raise NotFound(
                f"The adapter of {job_id} was deleted; create the job again with seed {job.seed}.",
                param="fine_tuning_job_id",
            ) from None


def _why_no_adapter(job: Job) -> str:
    if job.status == "failed":
        return f"Job {job.id} has failed and has no adapter: {(job.error or {}).get('message')}"
    if job.status == "cancelled":
        return f"Job {job.id} was cancelled and has no adapter; create it again to train one."
    if jobs.leaves_model(job):
        where = (
            f"download its result file {job.result_files[1]}" if job.result_files else "wait until it ends"
        )
        return (
            f"Job {job.id} exports the whole model and no adapter, since its adapter.export is 'merged'; "
            f"{where} (olora.results.model), or train again with adapter.export = 'adapter'."
        )
    reached = f" (step {job.step} of {job.total_steps})" if job.total_steps else ""
    return f"Job {job.id} is {job.status}{reached}; its adapter can be downloaded once it has succeeded."


def _object(row: Job, call: Call) -> JobObject:
    return JobObject.of(row, call.settings.organization)
