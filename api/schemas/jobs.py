"""The body that creates a job, and the objects of a job: itself, its events, its checkpoints."""

import secrets
from typing import Any, Literal

from pydantic import BaseModel, Field

from olora_core.specs import MAX_SEED, TrainSpec, check_validation, read_spec
from store.jobs import leaves_model
from store.kinds import FINE_TUNING, Kind
from store.models import Checkpoint, Event, Job

from .bodies import (
    JobOptions,
    MethodRequest,
    RequestBody,
    check_metadata,
    columns_of,
    hyperparameters_of,
    read_request,
    running_of,
    whole_seconds,
)


class CreateJob(RequestBody):
    """The body of POST /v1/fine_tuning/jobs."""

    model: str = Field(min_length=1, max_length=256, description="Id of a base model; see GET /v1/models.")
    training_file: str = Field(min_length=1, max_length=64, description="Id of an uploaded file.")
    validation_file: str | None = Field(default=None, max_length=64)
    suffix: str | None = Field(
        default=None, min_length=1, max_length=64, description="Suffix for the fine-tuned model's name."
    )
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    metadata: dict[str, str] | None = Field(default=None, description="Up to 16 pairs of text.")
    integrations: list[Any] | None = Field(
        default=None,
        description='Trackers to use: {"type": "wandb", "wandb": {"project", "entity", "name", "tags"}} '
        'or {"type": "mlflow", "mlflow": {"experiment", "run_name", "tags"}}.',
    )
    method: MethodRequest | None = None
    hyperparameters: dict[str, Any] | None = Field(
        default=None, description="The same as the method's hyperparameters, which newer clients send."
    )
    adapter: dict[str, Any] | None = Field(
        default=None, description='What to train: {"method": "olora", "rank": 16, …}.'
    )
    olora: JobOptions | None = None


def read_create(values: dict[str, Any]) -> CreateJob:
    """Raises BadRequest, naming the place."""
    request = read_request(CreateJob, values)
    check_metadata(request.metadata)
    return request


def spec_of(request: CreateJob, *, base: str, adapter: dict[str, Any] | None) -> TrainSpec:
    """What to train: `adapter` on a base model. Raises BadRequest or SpecError, naming the place."""
    type, hyperparameters, prefix = hyperparameters_of(request.method, request.hyperparameters)
    options = request.olora or JobOptions()
    spec = read_spec(
        model=base,
        type=type,
        hyperparameters=hyperparameters,
        adapter=adapter,
        seed=secrets.randbelow(MAX_SEED + 1) if request.seed is None else request.seed,
        validation_share=options.validation_share,
        group_by=options.group_by,
        columns=columns_of(request.olora),
        prefix=prefix,
    )
    check_validation(spec, given=request.validation_file is not None, prefix=prefix, place="olora.")
    return spec


class JobError(BaseModel):
    code: str
    message: str
    param: str | None


class JobObject(BaseModel):
    """A fine-tuning job. `adapter` describes the adapter; `olora` holds our other additions."""

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
            finished_at=whole_seconds(row.finished_at),
            estimated_finish=whole_seconds(row.estimated_finish) if row.status == "running" else None,
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
            olora=_olora(row),
        )


def _olora(row: Job) -> dict[str, Any]:
    """The answer's `olora` object."""
    return {
        **running_of(row),
        "step": row.step,
        "total_steps": row.total_steps,
        "plan": row.resolved,
        "certificate": row.certificate,
        "samples": row.samples,
        "results": dict(zip(_result_names(row), row.result_files, strict=False)),
    }


def _result_names(row: Job) -> tuple[str, ...]:
    """The names of the result files, in order; existing clients expect the metrics first."""
    return "metrics", "model" if leaves_model(row) else "adapter", "tensorboard"


EventName = Literal["fine_tuning.job.event", "comparison.event"]
EVENT_OBJECTS: dict[str, EventName] = {
    "fine_tuning": "fine_tuning.job.event",
    "comparison": "comparison.event",
}


class EventObject(BaseModel):
    """An event of a job; `data` has the values of a metrics event."""

    id: str
    object: EventName
    created_at: int
    level: str
    message: str
    type: str
    data: dict[str, Any] | None

    @classmethod
    def of(cls, row: Event, kind: Kind = FINE_TUNING) -> "EventObject":
        return cls(
            id=row.id,
            object=EVENT_OBJECTS[kind.name],
            created_at=int(row.created_at),
            level=row.level,
            message=row.message,
            type=row.type,
            data=row.data,
        )


class CheckpointObject(BaseModel):
    """A state of a job. Those at the ends of epochs are models; `olora.status` is their adapter's."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: dict[str, Any]
    olora: dict[str, Any]

    @classmethod
    def of(cls, row: Checkpoint, model: str, status: tuple[str, str | None]) -> "CheckpointObject":
        """`model` is the name of the job's model, `status` what `store.checkpoints.status_of` returns."""
        return cls(
            id=row.id,
            created_at=int(row.created_at),
            fine_tuned_model_checkpoint=row.model or f"{model}:ckpt-step-{row.step}",
            fine_tuning_job_id=row.job_id,
            step_number=row.step,
            metrics={**row.metrics, "step": row.step},
            olora={
                "is_model": row.model is not None,
                "epoch": row.epoch,
                "status": status[0],
                "problem": status[1],
                "adapter": row.adapter_file,
                "certificate": row.certificate,
            },
        )
