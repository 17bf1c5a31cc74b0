"""What comparisons have found is told in the words of the field."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

RENAMED = {
    "trained_numbers": "trainable_parameters",
    "steps_to_yardstick": "steps_to_baseline",
    "below_yardstick": "below_baseline",
}
JOBS = sa.table("jobs", sa.column("seq", sa.BigInteger), sa.column("findings", sa.JSON(none_as_null=True)))


def upgrade() -> None:
    connection = op.get_bind()
    found = sa.select(JOBS.c.seq, JOBS.c.findings).where(JOBS.c.findings.is_not(None))
    for seq, findings in connection.execute(found).all():
        connection.execute(sa.update(JOBS).where(JOBS.c.seq == seq).values(findings=_renamed(findings)))


def _renamed(value: Any) -> Any:
    if isinstance(value, dict):
        return {RENAMED.get(name, name): _renamed(item) for name, item in value.items()}
    return [_renamed(item) for item in value] if isinstance(value, list) else value
