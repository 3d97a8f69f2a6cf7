"""`usage`: who used how much."""

from __future__ import annotations

from typing import Annotated

import typer

from cluster.cli.moments import parse_since
from cluster.settings import load_settings

_COLUMNS = ("tenant", "kind", "model", "cpu_s", "gpu_s", "prompt_tokens", "completion_tokens")


def register(app: typer.Typer) -> None:
    app.command("usage")(show)


def show(
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's.")] = None,
    since: Annotated[str | None, typer.Option(help="30d, 12h, 45m, or an ISO 8601 time.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Seconds of CPU and GPU and tokens, by tenant, kind of work and model."""
    from cluster.cli.output import print_table
    from cluster.database import open_database
    from cluster.ledger import Ledger

    start = parse_since(since)
    totals = Ledger(open_database(load_settings().database)).totals(tenant=tenant, since=start)
    rows = [
        {**vars(total), "cpu_s": round(total.cpu_s, 1), "gpu_s": round(total.gpu_s, 1)}
        for total in totals
    ]
    print_table(rows, _COLUMNS, as_json=as_json, empty="nothing was used")
