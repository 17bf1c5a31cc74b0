"""Checkpoints are models, and jobs train on from models."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

KINDS = ("fine_tuning", "comparison", "export")


def upgrade() -> None:
    op.add_column("jobs", sa.Column("former_model", sa.String(length=600), nullable=True))
    op.add_column("jobs", sa.Column("former_file", sa.String(length=64), nullable=True))
    op.add_column("jobs", sa.Column("former_checkpoint", sa.String(length=64), nullable=True))
    _allow_exports()
    op.add_column("checkpoints", sa.Column("epoch", sa.Integer(), nullable=True))
    op.add_column("checkpoints", sa.Column("model", sa.String(length=600), nullable=True))
    op.add_column("checkpoints", sa.Column("export_job", sa.String(length=64), nullable=True))
    op.add_column("checkpoints", sa.Column("adapter_file", sa.String(length=64), nullable=True))
    op.add_column("checkpoints", sa.Column("certificate", sa.JSON(none_as_null=True), nullable=True))
    op.add_column("checkpoints", sa.Column("deleted_at", sa.Float(precision=53), nullable=True))
    # Checkpoints of earlier versions cannot be exported, and stay as they are.
    op.add_column(
        "checkpoints", sa.Column("is_final", sa.Boolean(), nullable=False, server_default=sa.true())
    )
    op.create_index(op.f("ix_checkpoints_model"), "checkpoints", ["model"], unique=True)


def _allow_exports() -> None:
    name, check = op.f("ck_jobs_kind"), f"kind IN {KINDS}"
    with op.batch_alter_table("jobs") as jobs:  # which copies the table on SQLite
        jobs.drop_constraint(name, type_="check")
        jobs.create_check_constraint(name, check)
