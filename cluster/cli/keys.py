"""`keys` and `tenants`: who may call the gateway."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cluster.cli.moments import parse_expiry
from cluster.settings import load_settings

if TYPE_CHECKING:
    from cluster.security.api_keys import ApiKeys

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]

keys_app = typer.Typer(help="API keys for the gateway.", no_args_is_help=True)
tenants_app = typer.Typer(
    help="Tenants, whose keys and usage are kept apart.", no_args_is_help=True
)


def register(app: typer.Typer) -> None:
    app.add_typer(keys_app, name="keys")
    app.add_typer(tenants_app, name="tenants")


@keys_app.command("create")
def create(
    tenant: Annotated[str, typer.Option(help="Whose key; a new name adds a tenant.")],
    scope: Annotated[
        list[str] | None, typer.Option(help="infer (default), models:read or admin; repeatable.")
    ] = None,
    expires: Annotated[str | None, typer.Option(help="30d, 12h, 45m, or an ISO 8601 time.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a key and print it, once: only its hash is stored."""
    import json

    created = _keys().create(tenant, scope or ["infer"], parse_expiry(expires))
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
    """Every key's id, tenant, scopes and state; never the key itself."""
    from cluster.cli.output import print_table

    rows = [{**vars(key), "state": key.state} for key in _keys().list(tenant)]
    columns = ("id", "tenant", "scopes", "state", "created_at", "expires_at")
    print_table(rows, columns, as_json=as_json, empty="no keys; `heliostat keys create` makes one")


@keys_app.command("revoke")
def revoke(key_id: Annotated[str, typer.Argument(help="An id from `keys list`.")]) -> None:
    """End a key for ever."""
    _keys().revoke(key_id)
    print(f"revoked {key_id}; gateways refuse it within a second")


@tenants_app.command("set")
def set_tenant(name: str) -> None:
    """Add a tenant."""
    _keys().set_tenant(name)
    print(name)


@tenants_app.command("list")
def list_tenants(as_json: JsonOption = False) -> None:
    """Every tenant."""
    from cluster.cli.output import print_table

    rows = [{"name": name, "created_at": created} for name, created in _keys().list_tenants()]
    print_table(rows, ("name", "created_at"), as_json=as_json, empty="no tenants")


def _keys() -> ApiKeys:
    from cluster.database import open_database
    from cluster.security.api_keys import ApiKeys

    return ApiKeys(open_database(load_settings().database))
