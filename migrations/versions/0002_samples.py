"""Jobs keep sample answers of the base and the tuned model."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("samples", sa.JSON(none_as_null=True), nullable=True))
