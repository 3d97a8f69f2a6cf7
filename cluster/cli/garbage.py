"""`gc`: remove what nothing refers to or nobody needs any more."""

from __future__ import annotations

from typing import Annotated

import typer

from cluster.cli.moments import parse_age
from cluster.settings import load_settings

_COLUMNS = ("kind", "key", "megabytes", "age_days", "reason")


def register(app: typer.Typer) -> None:
    app.command("gc")(collect)


def collect(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would go.")] = False,
    older_than: Annotated[str, typer.Option(help="30d, 12h or 45m; younger things stay.")] = "1d",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Remove packages no version lists, checkpoints of finished runs, files of tenants after 30
    days, work of ended batches and interrupted writes; sum up old months of usage."""
    from cluster.cli.output import print_table
    from cluster.garbage import find_garbage, remove

    settings = load_settings()
    found = find_garbage(settings, older_than_s=parse_age(older_than))
    if not dry_run:
        found = [garbage for garbage in found if remove(garbage, settings)]
    rows = [
        {
            **vars(garbage),
            "megabytes": round(garbage.size_bytes / 1e6, 1),
            "age_days": round(garbage.age_s / 86400, 1),
        }
        for garbage in found
    ]
    print_table(rows, _COLUMNS, as_json=as_json, empty="nothing to remove")
    if rows and not as_json:
        total = sum(garbage.size_bytes for garbage in found) / 1e6
        print(f"{total:,.1f} MB {'would be' if dry_run else 'were'} freed")
