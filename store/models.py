"""The database's tables. A job's row is the only truth about it.

Times are unix seconds (float) by the database's clock. Every row that a client can page through has an
increasing `seq`. Ids are opaque to clients; their prefixes follow OpenAI's.
"""

import secrets
import string
from typing import Any, ClassVar

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Text,
    true,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from .kinds import KINDS
from .session import db_now
from .statuses import STATUSES

_ALPHABET = string.ascii_letters + string.digits
Sequence = BigInteger().with_variant(Integer, "sqlite")
"""An auto-incremented 64-bit key on both databases."""


def new_id(prefix: str, length: int = 24) -> str:
    """A fresh id such as `ftjob-8hJq…`."""
    return prefix + "".join(secrets.choice(_ALPHABET) for _ in range(length))


class Row(DeclarativeBase):
    """What every table's class inherits."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        dict[str, Any]: JSON(none_as_null=True),
        list[Any]: JSON(none_as_null=True),
        float: Float(53),
    }


class Project(Row):
    """The tenant: owns keys, files, jobs and models."""

    __tablename__ = "projects"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[float] = mapped_column(default=db_now())
    last_turn_at: Mapped[float] = mapped_column(default=0.0)
    """When a job of this project was last claimed; the project that waited longest goes first."""


class Key(Row):
    """An API key; only its SHA-256 is kept."""

    __tablename__ = "keys"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), index=True)
    name: Mapped[str] = mapped_column(String(64))
    digest: Mapped[str] = mapped_column(String(64), unique=True)
    created_at: Mapped[float] = mapped_column(default=db_now())
    revoked_at: Mapped[float | None]


class File(Row):
    """An uploaded or produced file. `report` is the outcome of the structural validation."""

    __tablename__ = "files"

    seq: Mapped[int] = mapped_column(Sequence, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    filename: Mapped[str] = mapped_column(String(512))
    purpose: Mapped[str] = mapped_column(String(32))
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    storage_key: Mapped[str | None] = mapped_column(String(512))
    """Where the bytes are; null once a deleted file's bytes are gone."""
    status: Mapped[str] = mapped_column(String(16))
    """"processed", or "error" if the file cannot be used."""
    status_details: Mapped[str | None] = mapped_column(Text)
    report: Mapped[dict[str, Any] | None]
    created_at: Mapped[float] = mapped_column(default=db_now())
    expires_at: Mapped[float | None]
    deleted_at: Mapped[float | None]

    __table_args__ = (Index(None, "project_id", "seq"),)


class Job(Row):
    """A fine-tuning job, or a comparison of methods; `store/jobs.py` tells where their life cycle is."""

    __tablename__ = "jobs"

    seq: Mapped[int] = mapped_column(Sequence, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    kind: Mapped[str] = mapped_column(String(16), default="fine_tuning", server_default="fine_tuning")
    """See `store/kinds.py`."""
    status: Mapped[str] = mapped_column(String(24))
    model: Mapped[str] = mapped_column(String(256))
    """As requested: a base model, or an alias for the one in `spec`."""
    former_model: Mapped[str | None] = mapped_column(String(600))
    """The fine-tuned model, or the file with an adapter, that the job trains on from; null: the base."""
    former_file: Mapped[str | None] = mapped_column(String(64))
    former_checkpoint: Mapped[str | None] = mapped_column(String(64))
    """Where its adapter is: one of these two."""
    training_file: Mapped[str] = mapped_column(String(64))
    validation_file: Mapped[str | None] = mapped_column(String(64))
    suffix: Mapped[str | None] = mapped_column(String(64))
    seed: Mapped[int]
    job_metadata: Mapped[dict[str, Any] | None] = mapped_column("metadata")
    spec: Mapped[dict[str, Any]]
    """The requested TrainSpec or ComparisonSpec."""
    resolved: Mapped[dict[str, Any] | None]
    """TrainSpec with every "auto" a number, as the first attempt resolved it; later attempts keep it."""
    options: Mapped[dict[str, Any]] = mapped_column(default=dict)
    """The request's `olora` object."""
    integrations: Mapped[list[Any] | None]
    """The experiment trackers that the job reports to, as requested; null: none."""

    created_at: Mapped[float] = mapped_column(default=db_now())
    started_at: Mapped[float | None]
    finished_at: Mapped[float | None]
    estimated_finish: Mapped[float | None]

    priority: Mapped[int] = mapped_column(default=0)
    not_before: Mapped[float | None]
    dispatched_at: Mapped[float | None]
    dispatches: Mapped[int] = mapped_column(default=0)
    """Wake-ups sent since the job was last put in the queue; sets the back-off."""
    attempt: Mapped[int] = mapped_column(default=0)
    """The fence: rises at every claim, never falls."""
    failures: Mapped[int] = mapped_column(default=0)
    """Attempts in a row that ended by a crash or a lost lease without a new checkpoint."""
    lease_owner: Mapped[str | None] = mapped_column(String(128))
    lease_until: Mapped[float | None]
    waiting_since: Mapped[float | None]
    """When the job was queued; null once it runs, or its owner knows that no worker is there."""
    pause_reason: Mapped[str | None] = mapped_column(String(32))
    """Why a paused job was paused: "request", "auto_start" or the limit that it reached."""
    limits_from_attempt: Mapped[int] = mapped_column(default=0, server_default="0")
    limits_from_step: Mapped[int] = mapped_column(default=0, server_default="0")
    """Where the job was last resumed: its limits count what came later."""

    stage: Mapped[dict[str, Any] | None]
    """What the attempt is doing: `name`, and how much is `done` of a `total`; null while none runs."""
    step: Mapped[int] = mapped_column(default=0)
    total_steps: Mapped[int | None]
    trained_tokens: Mapped[int | None] = mapped_column(BigInteger)

    error: Mapped[dict[str, Any] | None]
    """`{code, message, param}`, or null."""
    fine_tuned_model: Mapped[str | None] = mapped_column(String(512))
    result_files: Mapped[list[Any]] = mapped_column(default=list)
    certificate: Mapped[dict[str, Any] | None]
    samples: Mapped[dict[str, Any] | None]
    """The answers of the base and the tuned model: `file` and `rows`, as in the trainer's `Samples`."""
    at_run: Mapped[dict[str, Any] | None]
    """A comparison's current run; see `store/comparisons.py`."""
    findings: Mapped[dict[str, Any] | None]
    """A comparison's report without its curves."""

    __table_args__ = (
        Index(None, "project_id", "kind", "seq"),
        Index(None, "status", "priority", "seq"),
        Index(None, "lease_until"),
        CheckConstraint(f"status IN {STATUSES}", name="status"),
        CheckConstraint(f"kind IN {tuple(KINDS)}", name="kind"),
    )


class Attempt(Row):
    """One claim of a job, kept as its history."""

    __tablename__ = "attempts"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    attempt: Mapped[int] = mapped_column(primary_key=True)
    owner: Mapped[str] = mapped_column(String(128))
    started_at: Mapped[float] = mapped_column(default=db_now())
    ended_at: Mapped[float | None]
    end_reason: Mapped[str | None] = mapped_column(String(64))


class Worker(Row):
    """A worker process, as it describes itself; one that was not seen for a while is gone."""

    __tablename__ = "workers"

    id: Mapped[str] = mapped_column(String(128), primary_key=True)
    """The same as `lease_owner` in the rows of its jobs."""
    host: Mapped[str] = mapped_column(String(255))
    device: Mapped[str] = mapped_column(String(255))
    memory_bytes: Mapped[int | None] = mapped_column(BigInteger)
    """The device's memory; on a CPU the machine's."""
    versions: Mapped[dict[str, Any]]
    """By package."""
    started_at: Mapped[float] = mapped_column(default=db_now())
    seen_at: Mapped[float] = mapped_column(default=db_now(), index=True)
    job_id: Mapped[str | None] = mapped_column(String(64))
    """What it works on."""


class Event(Row):
    """A message, or the metrics of a step, for the job's owner."""

    __tablename__ = "events"

    seq: Mapped[int] = mapped_column(Sequence, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    created_at: Mapped[float] = mapped_column(default=db_now())
    level: Mapped[str] = mapped_column(String(8))
    type: Mapped[str] = mapped_column(String(16))
    message: Mapped[str] = mapped_column(Text)
    data: Mapped[dict[str, Any] | None]

    __table_args__ = (Index(None, "job_id", "seq"),)


class Metric(Row):
    """One optimizer step of a job: one row, however often the step was repeated after crashes."""

    __tablename__ = "metrics"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True)
    values: Mapped[dict[str, Any]]


class Checkpoint(Row):
    """A state of a job to resume from. `storage_key` is a folder in the storage, null once it was pruned."""

    __tablename__ = "checkpoints"

    seq: Mapped[int] = mapped_column(Sequence, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    attempt: Mapped[int]
    step: Mapped[int]
    metrics: Mapped[dict[str, Any]]
    storage_key: Mapped[str | None] = mapped_column(String(512))
    created_at: Mapped[float] = mapped_column(default=db_now())
    epoch: Mapped[int | None]
    """The epoch that ended with it, counted from 1."""
    model: Mapped[str | None] = mapped_column(String(600))
    """Its name as a model; null if it is only there to resume from."""
    export_job: Mapped[str | None] = mapped_column(String(64))
    """The newest job that exports its adapter."""
    adapter_file: Mapped[str | None] = mapped_column(String(64))
    certificate: Mapped[dict[str, Any] | None]
    deleted_at: Mapped[float | None]
    is_final: Mapped[bool] = mapped_column(default=False, server_default=true())
    """Whether it has been reduced to what a model needs, after its job has ended."""

    __table_args__ = (Index(None, "job_id", "seq"), Index(None, "model", unique=True))


class Model(Row):
    """A fine-tuned model: a name for a succeeded job's adapter."""

    __tablename__ = "models"

    seq: Mapped[int] = mapped_column(Sequence, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(512), unique=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    created_at: Mapped[float] = mapped_column(default=db_now())
    deleted_at: Mapped[float | None]

    __table_args__ = (Index(None, "project_id", "seq"),)


class Request(Row):
    """A request that creates an object, so that a client's retry finds what the first try created."""

    __tablename__ = "requests"

    seq: Mapped[int] = mapped_column(Sequence, primary_key=True, autoincrement=True)
    key_digest: Mapped[str | None] = mapped_column(String(64), unique=True)
    """SHA-256 over API key, route and Idempotency-Key; null when the client sent none."""
    content_digest: Mapped[str] = mapped_column(String(64), index=True)
    """SHA-256 over API key, route and body."""
    created_at: Mapped[float] = mapped_column(default=db_now(), index=True)
    turn: Mapped[int] = mapped_column(default=1)
    """The fence: rises when a retry takes over from a try that has died."""
    turn_at: Mapped[float] = mapped_column(default=db_now())
    object_id: Mapped[str | None] = mapped_column(String(512))
    """The object that the request created; null until it is answered."""
