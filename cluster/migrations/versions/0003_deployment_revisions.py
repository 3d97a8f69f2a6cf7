"""Deployments: a revision that every change moves, when replicas were first asked
for, and by whom."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column(
        "deployments", sa.Column("revision", sa.Integer, nullable=False, server_default="0")
    )
    op.add_column("deployments", sa.Column("started_at", sa.String(32)))
    op.add_column(
        "deployments",
        sa.Column("requested_by", sa.String(128), nullable=False, server_default="controller"),
    )
