"""`keys` and `tenants`: who may call the gateway, for which models, and how much."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cluster.cli.moments import parse_expiry
from cluster.settings import load_settings

if TYPE_CHECKING:
    from cluster.security.api_keys import ApiKeys, Tenant

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
LimitOption = Annotated[int | None, typer.Option(help="0 is without limit, as at first.")]

keys_app = typer.Typer(help="API keys for the gateway.", no_args_is_help=True)
tenants_app = typer.Typer(
    help="Tenants, whose keys, limits and usage are kept apart.", no_args_is_help=True
)


def register(app: typer.Typer) -> None:
    app.add_typer(keys_app, name="keys")
    app.add_typer(tenants_app, name="tenants")


@keys_app.command("create")
def create(
    tenant: Annotated[str, typer.Option(help="Whose key; a new name adds a tenant.")],
    scope: Annotated[
        list[str] | None,
        typer.Option(help="infer (default), models:read, usage:read or admin; repeatable."),
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="The only models it is for, by name; repeatable.")
    ] = None,
    expires: Annotated[str | None, typer.Option(help="30d, 12h, 45m, or an ISO 8601 time.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a key and print it, once: only its hash is stored."""
    import json

    created = _keys().create(
        tenant, scope or ["infer"], parse_expiry(expires), models=model or None
    )
    if as_json:
        print(json.dumps(vars(created)))
    else:
        print(created.key)
        # Beside the key, not in its way: KEY=$(heliostat keys create …) takes stdout.
        typer.echo(f"to end it:  heliostat keys revoke {created.id}", err=True)


@keys_app.command("list")
def list_keys(
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Every key's id, tenant, scopes, models and state; never the key itself."""
    from cluster.cli.output import print_table

    rows = [{**vars(key), "state": key.state} for key in _keys().list(tenant)]
    columns = ("id", "tenant", "scopes", "models", "state", "created_at", "expires_at")
    print_table(rows, columns, as_json=as_json, empty="no keys; `heliostat keys create` makes one")


@keys_app.command("revoke")
def revoke(key_id: Annotated[str, typer.Argument(help="An id from `keys list`.")]) -> None:
    """End a key for ever."""
    _keys().revoke(key_id)
    print(f"revoked {key_id}; gateways refuse it within a second")


@tenants_app.command("set")
def set_tenant(
    name: str,
    requests_per_minute: LimitOption = None,
    tokens_per_minute: LimitOption = None,
    max_streams: LimitOption = None,
    monthly_tokens: LimitOption = None,
    as_json: JsonOption = False,
) -> None:
    """Add a tenant, or change its limits; what is not named stays as it is.

    Tokens are those of language models, prompts and answers; streams are answers of theirs under
    way; months are UTC's.
    """
    from cluster.cli.output import print_table

    asked = {
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "max_streams": max_streams,
        "monthly_tokens": monthly_tokens,
    }
    changes = {limit: value or None for limit, value in asked.items() if value is not None}
    row = _row(_keys().set_tenant(name, changes))
    print_table([row], tuple(row), as_json=as_json, empty="")


@tenants_app.command("list")
def list_tenants(as_json: JsonOption = False) -> None:
    """Every tenant, with its limits."""
    from cluster.cli.output import print_table

    rows = [_row(tenant) for tenant in _keys().list_tenants()]
    print_table(rows, tuple(rows[0]) if rows else (), as_json=as_json, empty="no tenants")


def _row(tenant: Tenant) -> dict[str, object]:
    return {"name": tenant.name, **vars(tenant.limits), "created_at": tenant.created_at}


def _keys() -> ApiKeys:
    from cluster.database import open_database
    from cluster.security.api_keys import ApiKeys

    return ApiKeys(open_database(load_settings().database))
