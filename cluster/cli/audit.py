"""`audit`: who administered what."""

from __future__ import annotations

from typing import Annotated

import typer

from cluster.cli.moments import parse_since
from cluster.settings import load_settings

_COLUMNS = ("at", "actor", "action", "target", "detail")


def register(app: typer.Typer) -> None:
    app.command("audit")(show)


def show(
    action: Annotated[
        str | None, typer.Option(help="Only key.create, say, or all of a kind, as key.")
    ] = None,
    since: Annotated[str | None, typer.Option(help="30d, 12h, 45m, or an ISO 8601 time.")] = None,
    last: Annotated[int, typer.Option(min=1, help="Not more than so many, the newest.")] = 100,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Acts of administration, oldest first: keys, tenants, deployments. They are never changed."""
    import json

    from cluster.cli.output import print_table
    from cluster.database import open_database
    from cluster.security.audit import AuditLog

    log = AuditLog(open_database(load_settings().database))
    rows = [vars(act) for act in log.list(action=action, since=parse_since(since), last=last)]
    if not as_json:
        rows = [{**row, "detail": json.dumps(row["detail"], ensure_ascii=False)} for row in rows]
    print_table(rows, _COLUMNS, as_json=as_json, empty="nothing was administered")
