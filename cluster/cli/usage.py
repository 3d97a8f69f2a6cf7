"""`usage`: who used how much."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from cluster.cli.moments import parse_since
from cluster.settings import load_settings


class Detail(StrEnum):
    KEY = "key"
    VERSION = "version"


_FIRST = ("tenant", "kind", "model")
_UNITS = ("num_requests", "prompt_tokens", "completion_tokens", "cpu_s", "gpu_s")


def register(app: typer.Typer) -> None:
    app.command("usage")(show)


def show(
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's.")] = None,
    since: Annotated[str | None, typer.Option(help="30d, 12h, 45m, or an ISO 8601 time.")] = None,
    by: Annotated[
        list[Detail] | None,
        typer.Option(help="Also apart by API key (or run), or by the model's version; repeatable."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Requests, tokens and seconds of CPU and GPU, by tenant, kind of work and model.

    What gateways answered in the last second may be missing.
    """
    from cluster.cli.output import print_table
    from cluster.database import open_database
    from cluster.ledger import Detail as LedgerDetail
    from cluster.ledger import Ledger

    names: dict[Detail, LedgerDetail] = {Detail.VERSION: "version", Detail.KEY: "source"}
    details = tuple(name for detail, name in names.items() if detail in (by or ()))
    ledger = Ledger(open_database(load_settings().database))
    totals = ledger.totals(tenant=tenant, since=parse_since(since), by=details)
    rows = [
        {**vars(total), "cpu_s": round(total.cpu_s, 1), "gpu_s": round(total.gpu_s, 1)}
        for total in totals
    ]
    columns = (*_FIRST, *details, *_UNITS)
    print_table(rows, columns, as_json=as_json, empty="nothing was used")
