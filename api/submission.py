"""Checks of the requests that create jobs and comparisons, and the metadata filter of their lists."""

from dataclasses import dataclass, field
from typing import Any, Literal

from fastapi import Request
from sqlalchemy.orm import Session

from olora_core.errors import ModelError
from store import aliases, checkpoints, files, fine_tuned, jobs
from store.errors import FileUnusable
from store.errors import NotFound as NotStored
from store.models import File

from .adapter_zips import base_of_adapter
from .deps import Call
from .errors import BadRequest
from .schemas.files import ADAPTER_PURPOSE

CHECKPOINT_MARK = ":ckpt-step-"


@dataclass(frozen=True)
class Source:
    """What a job trains: a base model, and perhaps an adapter that it goes on from."""

    base: str
    adapter: dict[str, Any] | None = None
    """The `adapter` object of the model that the job goes on from."""
    former: dict[str, str] = field(default_factory=dict)
    """The columns of a job that name that model."""


def base_of(call: Call, model: str) -> str:
    """The id of the base model that a comparison names. Raises BadRequest or ModelError."""
    if model.startswith(("ft:", "file-")):
        raise BadRequest(
            f"A comparison starts at a base model, and '{model[:200]}' is none; create a job to train it on.",
            param="model",
            code="model_not_available",
        )
    return aliases.base_id(call.settings, model)


def source_of(call: Call, model: str, base: str | None) -> Source:
    """What a job's `model` names; `base` is the one given for an uploaded adapter.

    Raises BadRequest, ModelError or NotFound.
    """
    if base is not None and not model.startswith("file-"):
        raise BadRequest("olora.base goes with an uploaded adapter as the model only.", param="olora.base")
    if model.startswith("ft:"):
        with call.reading() as session:
            return _fine_tuned_source(session, call, model)
    if model.startswith("file-"):
        with call.reading() as session:
            return _uploaded_source(session, call, model, base)
    return Source(aliases.base_id(call.settings, model))


def _fine_tuned_source(session: Session, call: Call, model: str) -> Source:
    try:
        if CHECKPOINT_MARK in model:
            checkpoint = checkpoints.get_checkpoint_model(session, call.project_id, model)
            job = jobs.get_job(session, call.project_id, checkpoint.job_id)
            where = {"former_checkpoint": checkpoint.id}
        else:
            job = jobs.get_job(
                session, call.project_id, fine_tuned.get_model(session, call.project_id, model).job_id
            )
            where = {"former_file": job.result_files[1]}
    except NotStored:
        raise BadRequest(
            f"There is no fine-tuned model '{model[:200]}' in this project; GET /v1/models lists them.",
            param="model",
            code="model_not_available",
        ) from None
    if jobs.leaves_model(job):
        raise BadRequest(
            f"'{model}' is a whole model and no adapter, so it cannot be trained on; train from its base "
            "model, or with adapter.export = 'adapter'.",
            param="model",
            code="model_not_available",
        )
    adapter = (job.resolved or job.spec)["adapter"]
    return Source(job.spec["model"], adapter, {"former_model": model, **where})


def _uploaded_source(session: Session, call: Call, file_id: str, base: str | None) -> Source:
    try:
        file = files.get_file(session, call.project_id, file_id)
    except NotStored:
        raise BadRequest(f"There is no file '{file_id}' in this project.", param="model") from None
    if file.purpose != ADAPTER_PURPOSE or file.storage_key is None:
        raise BadRequest(
            f"File {file_id} has purpose {file.purpose!r}; upload an adapter with purpose "
            f"'{ADAPTER_PURPOSE}'.",
            param="model",
        )
    with call.storage.open(file.storage_key) as stream:
        named = base or base_of_adapter(stream)
    if named is None:
        raise BadRequest(
            "The adapter does not name its base model; name it in olora.base.", param="olora.base"
        )
    try:
        found = aliases.base_id(call.settings, named)
    except ModelError as error:
        raise BadRequest(
            f"The adapter's base model is not available; name it in olora.base. {error.message}",
            param="olora.base",
            code=error.code,
        ) from None
    return Source(found, None, {"former_model": file_id, "former_file": file_id})


def adapter_of(asked: dict[str, Any] | None, source: Source) -> dict[str, Any] | None:
    """The `adapter` object of a job: of the same method as the former model's, it has its values."""
    if source.adapter is None:
        return asked
    given = asked or {}
    if given.get("method", source.adapter["method"]) != source.adapter["method"]:
        return asked
    kept = {name: value for name, value in source.adapter.items() if name not in ("export", "export_rank")}
    return {**kept, **given}


def usable(
    session: Session, call: Call, file_id: str, param: Literal["training_file", "validation_file"]
) -> File:
    """The caller's file, validated. Raises BadRequest or FileUnusable, naming `param`."""
    try:
        file = files.get_file(session, call.project_id, file_id)
    except NotStored:
        raise BadRequest(
            f"{param}: there is no file '{file_id}' in this project; it may have been deleted or have "
            "expired. Upload it again with POST /v1/files.",
            param=param,
            code=f"invalid_{param}",
        ) from None
    if file.status != "processed":
        raise FileUnusable(
            f"File '{file_id}' is still being processed and is not ready to be used for fine-tuning. "
            "Please try again later.",
            param=param,
        )
    return file


def metadata_filter(request: Request) -> dict[str, str] | Literal["null"] | None:
    """The metadata that a list is filtered by, or None. Raises BadRequest."""
    pairs: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name.startswith("metadata[") and name.endswith("]"):
            pairs[name[len("metadata[") : -1]] = value
    literal = request.query_params.get("metadata")
    if literal is None:
        return pairs or None
    if literal not in ("null", "") or pairs:  # the client for node writes null as nothing
        raise BadRequest(
            "Filter with metadata[key]=value for pairs, or with metadata=null alone for jobs without any.",
            param="metadata",
        )
    return "null"
