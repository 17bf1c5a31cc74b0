"""Comparisons of methods: create, list, retrieve, cancel, pause, resume; their reports."""

import json
from typing import Annotated, Literal

from fastapi import APIRouter, Header, Query, Request
from sqlalchemy.orm import Session
from starlette.responses import JSONResponse, Response

from olora_core.comparison.report_format import FORMAT, read_report
from olora_core.specs import ComparisonSpec
from store import control, files, jobs
from store.errors import JobStateError
from store.errors import NotFound as NotStored
from store.kinds import COMPARISON
from store.models import File, Job

from ..deps import After, BodyDep, Call, CallDep, Limit, OptionalBodyDep
from ..downloads import is_current, send_file
from ..errors import NotFound
from ..idempotency import once
from ..schemas.bodies import RESUME_SCHEMA, JobOptions, new_limits
from ..schemas.comparisons import RESULTS, ComparisonObject, CreateComparison, read_create
from ..schemas.pages import Page
from ..submission import base_of, metadata_filter, usable

router = APIRouter(prefix="/v1/comparisons", tags=["comparisons"])

BODY_SCHEMA = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": CreateComparison.model_json_schema()}},
    }
}
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; sandbox; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The page contains its styles and drawings: it loads nothing and runs nothing."""


@router.post("", openapi_extra=BODY_SCHEMA)
def create_comparison(body: BodyDep, call: CallDep) -> ComparisonObject:
    """The comparison is committed before the answer; the dispatcher then checks its files and queues it."""
    request, spec = read_create(body.values)
    spec = spec.model_copy(update={"model": base_of(call, request.model)})
    made_id, _ = once(
        call, "POST /v1/comparisons", body.digest, lambda session: _make(session, call, request, spec)
    )
    call.nudge()
    return retrieve_comparison(made_id, call)


def _make(session: Session, call: Call, request: CreateComparison, spec: ComparisonSpec) -> str:
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
        metadata=dict(request.metadata) if request.metadata is not None else None,
        options=options.model_dump(),
    )
    job.priority = options.priority
    return job.id


@router.get("")
def list_comparisons(
    request: Request, call: CallDep, after: After = None, limit: Limit = 20
) -> Page[ComparisonObject]:
    """Newest first. `metadata` filters as in the list of jobs."""
    wanted = metadata_filter(request)
    with call.reading() as session:
        page = jobs.list_jobs(
            session, call.project_id, kind=COMPARISON, metadata=wanted, after=after, limit=limit
        )
        return Page[ComparisonObject].of([ComparisonObject.of(row) for row in page.data], page.has_more)


@router.get("/{comparison_id}")
def retrieve_comparison(comparison_id: str, call: CallDep) -> ComparisonObject:
    with call.reading() as session:
        return ComparisonObject.of(jobs.get_job(session, call.project_id, comparison_id, COMPARISON))


@router.post("/{comparison_id}/cancel")
def cancel_comparison(comparison_id: str, call: CallDep) -> ComparisonObject:
    """Ends the comparison at once; `olora.stopping` is true until its trainer has stopped."""
    with call.writing() as session:
        job = jobs.get_job(session, call.project_id, comparison_id, COMPARISON)
        return ComparisonObject.of(control.cancel(session, job))


@router.post("/{comparison_id}/pause")
def pause_comparison(comparison_id: str, call: CallDep) -> ComparisonObject:
    """Pauses the comparison at once; `olora.stopping` is true until its trainer has stopped."""
    with call.writing() as session:
        job = jobs.get_job(session, call.project_id, comparison_id, COMPARISON)
        return ComparisonObject.of(control.pause(session, job, call.settings))


@router.post("/{comparison_id}/resume", openapi_extra=RESUME_SCHEMA)
def resume_comparison(comparison_id: str, body: OptionalBodyDep, call: CallDep) -> ComparisonObject:
    """Queues a paused comparison, which goes on from its newest checkpoint."""
    limits = new_limits(body.values)
    with call.writing() as session:
        job = jobs.get_job(session, call.project_id, comparison_id, COMPARISON)
        resumed = ComparisonObject.of(control.resume(session, job, limits))
    call.nudge()
    return resumed


@router.get("/{comparison_id}/report", response_class=Response)
def retrieve_report(
    comparison_id: str,
    call: CallDep,
    format: Annotated[
        Literal["html", "json"] | None, Query(description="The format of the report, whatever Accept says.")
    ] = None,
    accept: Annotated[str, Header()] = "",
    if_none_match: Annotated[str | None, Header()] = None,
) -> Response:
    """The report as one self-contained page, or all its numbers as JSON."""
    wanted = format or ("json" if "application/json" in accept and "text/html" not in accept else "html")
    row = _result(comparison_id, call, "report" if wanted == "json" else "page")
    earlier = _of_an_earlier_format(call, row) if wanted == "json" else None
    if earlier is None and is_current(row, if_none_match):
        return Response(status_code=304, headers={"etag": f'"{row.sha256}"', "vary": "accept"})
    answer = earlier or send_file(call.storage, row)
    answer.headers["content-disposition"] = "inline"
    answer.headers["content-security-policy"] = PAGE_POLICY
    answer.headers["vary"] = "accept"
    return answer


def _of_an_earlier_format(call: Call, row: File) -> Response | None:
    """A report that an earlier version stored, with the names of this one; None for one of this version.

    It has no ETag: the stored file's stands for other bytes.
    """
    if row.storage_key is None:
        return None
    with call.storage.open(row.storage_key) as stored:
        report = json.load(stored)
    return None if report["format"] == FORMAT else JSONResponse(read_report(report))


def _result(comparison_id: str, call: Call, which: str) -> File:
    with call.reading() as session:
        job = jobs.get_job(session, call.project_id, comparison_id, COMPARISON)
        if job.status != "succeeded":
            raise JobStateError(_why_no_report(job))
        try:
            return files.get_file(session, call.project_id, job.result_files[RESULTS.index(which)])
        except NotStored:
            raise NotFound(
                f"The {which} of {job.id} was deleted; create the comparison again to get another.",
                param=COMPARISON.param,
            ) from None


def _why_no_report(job: Job) -> str:
    if job.status == "failed":
        return f"Comparison {job.id} has failed and has no report: {(job.error or {}).get('message')}"
    if job.status == "cancelled":
        return f"Comparison {job.id} was cancelled and has no report; create it again to get one."
    reached = f" (step {job.step} of {job.total_steps})" if job.total_steps else ""
    return f"Comparison {job.id} is {job.status}{reached}; its report can be read once it has succeeded."
