"""What the bodies that create jobs and comparisons have in common, and their error messages."""

import difflib
import time
from datetime import datetime
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from olora_core.formats import check_columns
from olora_core.specs import Columns, GroupBy, ValidationShare
from olora_core.specs.validation import refusal
from store.models import Job

from ..errors import BadRequest

MAX_SECONDS = 2**31 - 1
"""68 years. A worker adds this to its clock, which far larger numbers would overflow."""
MAX_TOKENS = 2**53
MAX_TIME = 253402300799
"""The end of the year 9999."""


class RequestBody(BaseModel):
    """Accepts only the declared fields, with exactly their types."""

    model_config = ConfigDict(extra="forbid", strict=True)


BodyT = TypeVar("BodyT", bound=RequestBody)


class SupervisedRequest(RequestBody):
    hyperparameters: dict[str, Any] | None = None


class DpoRequest(RequestBody):
    hyperparameters: dict[str, Any] | None = None


class MethodRequest(RequestBody):
    type: str = Field(description="'supervised' or 'dpo'.")
    supervised: SupervisedRequest | None = None
    dpo: DpoRequest | None = None
    reinforcement: dict[str, Any] | None = Field(default=None, description="Not available yet.")


class LimitOptions(RequestBody):
    """The limits at which a job is paused, with a checkpoint to resume from."""

    max_seconds: int | None = Field(
        default=None,
        ge=1,
        le=MAX_SECONDS,
        description="The job is paused when its attempts together have taken this long.",
    )
    finish_by: int | str | None = Field(
        default=None,
        description="The job is paused if it has not ended by this time: unix seconds, or ISO 8601 with a "
        "time zone.",
    )
    max_train_tokens: int | None = Field(
        default=None,
        ge=1,
        le=MAX_TOKENS,
        description="The job is paused when it has trained on this many tokens.",
    )

    @field_validator("finish_by")
    @classmethod
    def _as_seconds(cls, value: int | str | None) -> int | None:
        if isinstance(value, str):
            value = _seconds_of(value)
        if value is not None and not time.time() < value <= MAX_TIME:
            raise ValueError("must be a time in the future, before the year 10000")
        return value


def _seconds_of(text: str) -> int:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise ValueError("must be unix seconds or a time such as 2027-01-06T18:00:00+00:00")
    return int(moment.timestamp())


class JobOptions(LimitOptions):
    """The request's `olora` object: how the job is run, and what OpenAI's API has no fields for."""

    priority: int = Field(default=0, ge=0, le=9, description="Jobs of a higher priority are started first.")
    devices: int = Field(
        default=1, ge=1, le=64, description="GPUs that the job runs on; a worker must own as many."
    )
    base: str | None = Field(
        default=None,
        max_length=256,
        description="The base model of an uploaded adapter that does not name it.",
    )
    auto_start: bool = Field(
        default=True, description="false: the job is paused until it is resumed for the first time."
    )
    validation_share: ValidationShare = None
    group_by: GroupBy = None
    columns: Columns = None


class ResumeRequest(RequestBody):
    """The body of a request to resume, which OpenAI's clients leave empty."""

    olora: LimitOptions | None = None


RESUME_SCHEMA = {
    "requestBody": {
        "required": False,
        "content": {"application/json": {"schema": ResumeRequest.model_json_schema()}},
    }
}


def new_limits(values: dict[str, Any]) -> dict[str, Any]:
    """The limits that a request to resume sets. Raises BadRequest."""
    options = read_request(ResumeRequest, values).olora
    return options.model_dump(exclude_unset=True) if options else {}


def columns_of(options: JobOptions | None) -> dict[str, str] | None:
    """The request's mapping of columns. Raises SpecError."""
    columns = options.columns if options else None
    check_columns(columns, "olora.columns")
    return columns


def read_request(model: type[BodyT], values: dict[str, Any]) -> BodyT:
    """Validates a body. Raises BadRequest."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise _bad_field(model, error) from None


def hyperparameters_of(
    method: MethodRequest | None, hyperparameters: dict[str, Any] | None
) -> tuple[str, dict[str, Any], str]:
    """The type of training, its hyperparameters from either place, and the place's name for errors.

    Raises BadRequest for a hyperparameter with two values, and for the options of another type.
    """
    method = method or MethodRequest(type="supervised")
    for other in ("supervised" if method.type == "dpo" else "dpo", "reinforcement"):
        if getattr(method, other) is not None and method.type != other:
            raise BadRequest(
                f"method.{other} does not go with method.type '{method.type}'; leave it out.",
                param=f"method.{other}",
            )
    own = method.dpo if method.type == "dpo" else method.supervised
    place = f"method.{method.type}.hyperparameters"
    new = _given((own and own.hyperparameters) or {})
    old = _given(hyperparameters or {})
    for name in new.keys() & old.keys():
        if new[name] != old[name]:
            raise BadRequest(
                f"hyperparameters.{name} = {old[name]!r} contradicts "
                f"{place}.{name} = {new[name]!r}; give it once.",
                param=f"hyperparameters.{name}",
            )
    return method.type, {**old, **new}, place if new and not old else "hyperparameters"


def _given(hyperparameters: dict[str, Any]) -> dict[str, Any]:
    """Without those that are null, which some clients send for what was not set."""
    return {name: value for name, value in hyperparameters.items() if value is not None}


def check_metadata(metadata: dict[str, str] | None) -> None:
    if metadata is None:
        return
    if len(metadata) > 16:
        raise BadRequest(f"metadata must have at most 16 pairs (got {len(metadata)}).", param="metadata")
    for key, value in metadata.items():
        if not 1 <= len(key) <= 64:
            raise BadRequest(
                f"metadata key {key[:70]!r} must have 1 to 64 characters (got {len(key)}).", param="metadata"
            )
        if len(value) > 512:
            raise BadRequest(
                f"metadata.{key} must have at most 512 characters (got {len(value)}).",
                param=f"metadata.{key}",
            )


def running_of(row: Job) -> dict[str, Any]:
    """How a job or comparison is run, and what it is doing: the first part of the answer's `olora` object."""
    return {
        **JobOptions().model_dump(),
        **row.options,
        "base": row.spec["model"],
        "former": row.former_model,
        "attempt": row.attempt,
        "failures": row.failures,
        "stage": row.stage,
        "stopping": row.status != "running" and row.lease_owner is not None,
        "pause_reason": row.pause_reason,
        "started_at": whole_seconds(row.started_at),
    }


def whole_seconds(moment: float | None) -> int | None:
    return None if moment is None else int(moment)


def _bad_field(model: type[RequestBody], error: ValidationError) -> BadRequest:
    """The first error as one sentence that names the field, with the nearest known name."""
    problems = error.errors(include_url=False)
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    place = [str(part) for part in problem["loc"]]
    param = ".".join(place)
    if problem["type"] == "extra_forbidden":
        known = _fields_at(model, place[:-1])
        match = difflib.get_close_matches(place[-1], known, n=1, cutoff=0.6)
        hint = f" (did you mean '{match[0]}'?)" if match else ""
        return BadRequest(f"{param} is unknown{hint}. Known: {', '.join(known)}.", param=param)
    return BadRequest(refusal(param, problem), param=param)


def _fields_at(model: type[RequestBody], place: list[str]) -> list[str]:
    """The known names in the object at `place`."""
    for name in place:
        annotation = model.model_fields[name].annotation
        parts = (annotation, *get_args(annotation))
        model = next(part for part in parts if isinstance(part, type) and issubclass(part, RequestBody))
    return list(model.model_fields)
