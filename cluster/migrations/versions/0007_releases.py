"""What a release is doing, what speaks for and against it, and who may act on it."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    text, number = sa.String(32), sa.Integer()
    for column in (
        sa.Column("release_id", text, nullable=False, server_default=""),
        sa.Column("strategy", sa.String(16), nullable=False, server_default="direct"),
        sa.Column("step", number, nullable=False, server_default="0"),
        sa.Column("share", sa.Float, nullable=False, server_default="0"),
        sa.Column("mirror_share", sa.Float, nullable=False, server_default="0"),
        sa.Column("is_paused", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column("sunset_at", text),
    ):
        op.add_column("deployments", column)
    op.create_table(
        "release_events",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("at", sa.String(32), nullable=False),
        sa.Column("name", sa.String(128), nullable=False, index=True),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("release_id", sa.String(32), nullable=False),
        sa.Column("state", sa.String(32), nullable=False),
        sa.Column("actor", sa.String(128), nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
    )
    op.create_table(
        "release_evidence",
        sa.Column("release_id", sa.String(32), primary_key=True),
        sa.Column("step", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("arm", sa.String(16), primary_key=True),
        sa.Column("metric", sa.String(32), primary_key=True),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("num", sa.BigInteger, nullable=False),
        sa.Column("total", sa.Float, nullable=False),
        sa.Column("updated_at", sa.String(32), nullable=False),
    )
    op.create_table(
        "controller_leases",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("owner", sa.String(64), nullable=False),
        sa.Column("expires_at", sa.String(32), nullable=False),
    )
