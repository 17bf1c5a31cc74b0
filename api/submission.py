"""Checks of the requests that create jobs and comparisons, and the metadata filter of their lists."""

from typing import Literal

from fastapi import Request
from sqlalchemy.orm import Session

from store import aliases, files
from store.errors import FileUnusable
from store.errors import NotFound as NotStored
from store.models import File

from .deps import Call
from .errors import BadRequest


def base_of(call: Call, model: str) -> str:
    """The id of the base model that a request names. Raises BadRequest or ModelError."""
    if model.startswith("ft:"):
        raise BadRequest(
            f"Continuing from the fine-tuned model '{model}' is not available yet; use a base model.",
            param="model",
            code="model_not_available",
        )
    return aliases.base_id(call.settings, model)


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
