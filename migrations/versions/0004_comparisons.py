"""The jobs table also holds comparisons."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # One statement that both databases know; otherwise SQLite would rebuild the table for the check.
    op.execute(
        "ALTER TABLE jobs ADD COLUMN kind VARCHAR(16) DEFAULT 'fine_tuning' NOT NULL "
        "CONSTRAINT ck_jobs_kind CHECK (kind IN ('fine_tuning', 'comparison'))"
    )
    op.add_column("jobs", sa.Column("at_run", sa.JSON(none_as_null=True), nullable=True))
    op.add_column("jobs", sa.Column("findings", sa.JSON(none_as_null=True), nullable=True))
    op.drop_index(op.f("ix_jobs_project_id_seq"), "jobs")
    op.create_index(op.f("ix_jobs_project_id_kind_seq"), "jobs", ["project_id", "kind", "seq"])
