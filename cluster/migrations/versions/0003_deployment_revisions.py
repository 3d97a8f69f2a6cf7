"""Deployments: a revision that every change moves, and when replicas were first asked for."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column(
        "deployments", sa.Column("revision", sa.Integer, nullable=False, server_default="0")
    )
    op.add_column("deployments", sa.Column("started_at", sa.String(32)))
