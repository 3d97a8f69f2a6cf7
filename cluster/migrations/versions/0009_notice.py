"""Since when users of a version know that it will end."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    op.add_column("deployments", sa.Column("noticed_at", sa.String(32)))
    op.execute("UPDATE deployments SET noticed_at = updated_at WHERE sunset_at IS NOT NULL")
