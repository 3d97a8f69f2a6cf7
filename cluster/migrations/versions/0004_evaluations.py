"""Evaluations of packages; an alias history that the database itself only ever adds to."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.create_table(
        "evaluations",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("at", sa.String(32), nullable=False),
        sa.Column("digest", sa.String(71), nullable=False, index=True),
        sa.Column("dataset_digest", sa.String(71), nullable=False),
        sa.Column("split", sa.String(32), nullable=False),
        sa.Column("metrics", sa.JSON, nullable=False),
        sa.Column("run_id", sa.String(64), nullable=False),
    )
    if op.get_bind().dialect.name == "postgresql":
        op.execute(
            "CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$ "
            "BEGIN RAISE EXCEPTION '% is only ever added to', TG_TABLE_NAME; END $$"
        )
        op.execute(
            "CREATE TRIGGER alias_history_only_grows BEFORE UPDATE OR DELETE OR TRUNCATE "
            "ON alias_history FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()"
        )
        return
    for change in ("UPDATE", "DELETE"):
        op.execute(
            f"CREATE TRIGGER alias_history_no_{change.lower()} BEFORE {change} ON alias_history "
            "BEGIN SELECT RAISE(ABORT, 'alias_history is only ever added to'); END"
        )
