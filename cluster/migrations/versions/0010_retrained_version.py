"""The version that a training for drift has made, and that its gate decides on."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    op.add_column("retrainings", sa.Column("candidate", sa.Integer))
