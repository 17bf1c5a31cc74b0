"""The body that creates a job, and the objects of a job: itself, its events, its checkpoints."""

import difflib
import secrets
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from olora_core.specs import MAX_SEED, TrainSpec, check_validation, read_spec
from store.fine_tuned import model_name
from store.jobs import leaves_model
from store.models import Checkpoint, Event, Job

from ..errors import BadRequest, misfit

MAX_SECONDS = 2**31 - 1
"""68 years; a worker adds its clock to it, in which far larger numbers have no place."""


class Request(BaseModel):
    """Takes the names it knows, in the types it says."""

    model_config = ConfigDict(extra="forbid", strict=True)


class SupervisedRequest(Request):
    hyperparameters: dict[str, Any] | None = None


class DpoRequest(Request):
    hyperparameters: dict[str, Any] | None = None


class MethodRequest(Request):
    type: str = Field(description="'supervised' or 'dpo'.")
    supervised: SupervisedRequest | None = None
    dpo: DpoRequest | None = None
    reinforcement: dict[str, Any] | None = Field(default=None, description="Not available yet.")


class JobOptions(Request):
    """The request's `olora` object: how the job is run, not what is trained."""

    priority: int = Field(default=0, ge=0, le=9, description="Jobs of a higher priority are started first.")
    devices: int = Field(
        default=1, ge=1, le=64, description="GPUs that the job runs on; a worker must own as many."
    )
    max_seconds: int | None = Field(
        default=None,
        ge=1,
        le=MAX_SECONDS,
        description="The job fails when its attempts together have taken this long.",
    )


class CreateJob(Request):
    """The body of POST /v1/fine_tuning/jobs."""

    model: str = Field(min_length=1, max_length=256, description="Id of a base model; see GET /v1/models.")
    training_file: str = Field(min_length=1, max_length=64, description="Id of an uploaded file.")
    validation_file: str | None = Field(default=None, max_length=64)
    suffix: str | None = Field(default=None, min_length=1, max_length=64, description="Part of the new name.")
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    metadata: dict[str, str] | None = Field(default=None, description="Up to 16 pairs of text.")
    integrations: list[Any] | None = Field(
        default=None,
        description='Trackers to tell: {"type": "wandb", "wandb": {"project", "entity", "name", "tags"}} or '
        '{"type": "mlflow", "mlflow": {"experiment", "run_name", "tags"}}.',
    )
    method: MethodRequest | None = None
    hyperparameters: dict[str, Any] | None = Field(
        default=None, description="As in the method's own hyperparameters, where newer callers put them."
    )
    adapter: dict[str, Any] | None = Field(
        default=None, description='What to train: {"method": "olora", "rank": 16, …}.'
    )
    olora: JobOptions | None = None


def read_create(values: dict[str, Any]) -> CreateJob:
    """Reads the body's own structure; `spec_of` reads what to train. Raises BadRequest."""
    try:
        request = CreateJob.model_validate(values)
    except ValidationError as error:
        raise _bad_field(error) from None
    _check_metadata(request.metadata)
    return request


def spec_of(request: CreateJob) -> TrainSpec:
    """What to train. Raises SpecError or BadRequest, naming the place."""
    method = request.method or MethodRequest(type="supervised")
    for other in ("supervised" if method.type == "dpo" else "dpo", "reinforcement"):
        if getattr(method, other) is not None and method.type != other:
            raise BadRequest(
                f"method.{other} does not go with method.type '{method.type}'; leave it out.",
                param=f"method.{other}",
            )
    own = method.dpo if method.type == "dpo" else method.supervised
    place = f"method.{method.type}.hyperparameters"
    new = (own and own.hyperparameters) or {}
    old = request.hyperparameters or {}
    for name in new.keys() & old.keys():
        if new[name] != old[name]:
            raise BadRequest(
                f"hyperparameters.{name} = {old[name]!r} contradicts "
                f"{place}.{name} = {new[name]!r}; give it once.",
                param=f"hyperparameters.{name}",
            )
    prefix = place if new and not old else "hyperparameters"
    spec = read_spec(
        model=request.model,
        type=method.type,
        hyperparameters={**old, **new},
        adapter=request.adapter,
        seed=secrets.randbelow(MAX_SEED + 1) if request.seed is None else request.seed,
        prefix=prefix,
    )
    check_validation(spec, given=request.validation_file is not None, prefix=prefix)
    return spec


def _check_metadata(metadata: dict[str, str] | None) -> None:
    if metadata is None:
        return
    if len(metadata) > 16:
        raise BadRequest(f"metadata has {len(metadata)} pairs; it may have 16.", param="metadata")
    for key, value in metadata.items():
        if not 1 <= len(key) <= 64:
            raise BadRequest(
                f"metadata key {key[:70]!r} has {len(key)} characters; 1 to 64 fit.", param="metadata"
            )
        if len(value) > 512:
            raise BadRequest(f"metadata.{key} has {len(value)} characters; 512 fit.", param=f"metadata.{key}")


def _bad_field(error: ValidationError) -> BadRequest:
    """The first complaint as one sentence that names the field, with the nearest known name."""
    problems = error.errors(include_url=False)
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    place = [str(part) for part in problem["loc"]]
    param = ".".join(place)
    if problem["type"] == "extra_forbidden":
        known = _fields_at(place[:-1])
        match = difflib.get_close_matches(place[-1], known, n=1, cutoff=0.6)
        hint = f" (did you mean '{match[0]}'?)" if match else ""
        return BadRequest(f"{param} is unknown{hint}. Known here: {', '.join(known)}.", param=param)
    if problem["type"] == "missing":
        return BadRequest(f"{param} is missing; it is required.", param=param)
    return BadRequest(misfit(param, problem["input"], str(problem["msg"])), param=param)


def _fields_at(place: list[str]) -> list[str]:
    """The known names in the object at `place`."""
    models: dict[str, type[Request]] = {
        "": CreateJob,
        "method": MethodRequest,
        "method.supervised": SupervisedRequest,
        "method.dpo": DpoRequest,
        "olora": JobOptions,
    }
    return list(models[".".join(place)].model_fields)


class JobError(BaseModel):
    code: str
    message: str
    param: str | None


class JobObject(BaseModel):
    """A fine-tuning job. `adapter` is what is trained; `olora` is all else that is ours."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    status: str
    model: str
    fine_tuned_model: str | None
    organization_id: str
    training_file: str
    validation_file: str | None
    result_files: list[str]
    hyperparameters: dict[str, Any]
    method: dict[str, Any]
    seed: int
    trained_tokens: int | None
    user_provided_suffix: str | None
    metadata: dict[str, str] | None
    integrations: list[Any]
    error: JobError | None
    adapter: dict[str, Any]
    olora: dict[str, Any]

    @classmethod
    def of(cls, row: Job, organization: str) -> "JobObject":
        spec = row.resolved or row.spec
        hyperparameters = spec["hyperparameters"]
        return cls(
            id=row.id,
            created_at=int(row.created_at),
            finished_at=_seconds(row.finished_at),
            estimated_finish=_seconds(row.estimated_finish) if row.status == "running" else None,
            status=row.status,
            model=row.model,
            fine_tuned_model=row.fine_tuned_model,
            organization_id=organization,
            training_file=row.training_file,
            validation_file=row.validation_file,
            result_files=row.result_files,
            hyperparameters=hyperparameters,
            method={"type": spec["type"], spec["type"]: {"hyperparameters": hyperparameters}},
            seed=row.seed,
            trained_tokens=row.trained_tokens,
            user_provided_suffix=row.suffix,
            metadata=row.job_metadata,
            integrations=row.integrations or [],
            error=JobError(**row.error) if row.error else None,
            adapter=spec["adapter"],
            olora=_own_facts(row),
        )


def _own_facts(row: Job) -> dict[str, Any]:
    """The answer's `olora` object."""
    return {
        **row.options,
        "attempt": row.attempt,
        "failures": row.failures,
        "requested": row.requested,
        "started_at": _seconds(row.started_at),
        "step": row.step,
        "total_steps": row.total_steps,
        "plan": row.resolved,
        "certificate": row.certificate,
        "samples": row.samples,
        "results": dict(zip(_result_names(row), row.result_files, strict=False)),
    }


def _result_names(row: Job) -> tuple[str, ...]:
    """What the result files are, in their order; code in the wild counts on the first."""
    return "metrics", "model" if leaves_model(row) else "adapter", "tensorboard"


def _seconds(moment: float | None) -> int | None:
    return None if moment is None else int(moment)


class EventObject(BaseModel):
    """Something that happened to a job; `data` carries the numbers of a metrics event."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: str
    message: str
    type: str
    data: dict[str, Any] | None

    @classmethod
    def of(cls, row: Event) -> "EventObject":
        return cls(
            id=row.id,
            created_at=int(row.created_at),
            level=row.level,
            message=row.message,
            type=row.type,
            data=row.data,
        )


class CheckpointObject(BaseModel):
    """A state that the job goes on from after an interruption."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: dict[str, Any]

    @classmethod
    def of(cls, row: Checkpoint, job: Job, organization: str) -> "CheckpointObject":
        model = job.fine_tuned_model or model_name(job.model, organization, job.suffix, job.id)
        return cls(
            id=row.id,
            created_at=int(row.created_at),
            fine_tuned_model_checkpoint=f"{model}:ckpt-step-{row.step}",
            fine_tuning_job_id=job.id,
            step_number=row.step,
            metrics={**row.metrics, "step": row.step},
        )
