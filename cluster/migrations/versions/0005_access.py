"""What a key may use, what a tenant may spend, who used which version; an audit log that the
database itself only ever adds to."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.add_column("api_keys", sa.Column("models", sa.JSON))
    for limit in ("requests_per_minute", "tokens_per_minute", "max_streams", "monthly_tokens"):
        op.add_column("tenants", sa.Column(limit, sa.BigInteger))
    op.add_column("ledger_entries", sa.Column("version", sa.Integer))
    op.add_column(
        "ledger_entries",
        sa.Column("num_requests", sa.BigInteger, nullable=False, server_default="0"),
    )
    op.create_table(
        "budgets",
        sa.Column("tenant", sa.String(128), sa.ForeignKey("tenants.name"), primary_key=True),
        sa.Column("month", sa.String(7), nullable=False),
        sa.Column("month_tokens", sa.BigInteger, nullable=False),
        sa.Column("state", sa.JSON, nullable=False),
    )
    if op.get_bind().dialect.name == "postgresql":
        op.execute(
            "CREATE TRIGGER audit_log_only_grows BEFORE UPDATE OR DELETE OR TRUNCATE "
            "ON audit_log FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()"
        )
        return
    for change in ("UPDATE", "DELETE"):
        op.execute(
            f"CREATE TRIGGER audit_log_no_{change.lower()} BEFORE {change} ON audit_log "
            "BEGIN SELECT RAISE(ABORT, 'audit_log is only ever added to'); END"
        )
