"""Jobs can be paused and say what they are doing; workers describe themselves."""

import time

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

COUNT = {"nullable": False, "server_default": "0"}


def upgrade() -> None:
    op.add_column("jobs", sa.Column("waiting_since", sa.Float(precision=53), nullable=True))
    op.add_column("jobs", sa.Column("pause_reason", sa.String(length=32), nullable=True))
    op.add_column("jobs", sa.Column("limits_from_attempt", sa.Integer(), **COUNT))
    op.add_column("jobs", sa.Column("limits_from_step", sa.Integer(), **COUNT))
    op.add_column("jobs", sa.Column("stage", sa.JSON(none_as_null=True), nullable=True))
    _end_cancelled_jobs()
    op.drop_column("jobs", "requested")
    op.create_index(op.f("ix_jobs_lease_until"), "jobs", ["lease_until"])
    op.create_table(
        "workers",
        sa.Column("id", sa.String(length=128), nullable=False),
        sa.Column("host", sa.String(length=255), nullable=False),
        sa.Column("device", sa.String(length=255), nullable=False),
        sa.Column("memory_bytes", sa.BigInteger(), nullable=True),
        sa.Column("versions", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("started_at", sa.Float(precision=53), nullable=False),
        sa.Column("seen_at", sa.Float(precision=53), nullable=False),
        sa.Column("job_id", sa.String(length=64), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_workers")),
    )
    op.create_index(op.f("ix_workers_seen_at"), "workers", ["seen_at"])


def _end_cancelled_jobs() -> None:
    """A running job was asked to end by a mark in its row; now its status says so."""
    jobs = sa.table("jobs", sa.column("status"), sa.column("requested"), sa.column("finished_at"))
    asked = sa.update(jobs).where(jobs.c.status == "running", jobs.c.requested == "cancel")
    op.execute(asked.values(status="cancelled", finished_at=time.time()))
