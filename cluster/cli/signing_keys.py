"""`models keys`: whose signature makes a package one that this installation opens.

Printing and the audit log only; the keys are in `cluster.model_package.keys`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.cli.models import actor
from cluster.settings import load_settings

if TYPE_CHECKING:
    from cluster.model_package import SigningKeys

app = typer.Typer(
    help="Signing keys: which ones packages may be signed with.", no_args_is_help=True
)

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("list")
def list_keys(as_json: JsonOption = False) -> None:
    """Every key that may sign packages, or no longer may."""
    from cluster.cli.output import print_table

    rows = [{**vars(key), "signs_here": key.is_local or None} for key in _keys().known()]
    columns = ("fingerprint", "state", "signs_here", "note")
    print_table(rows, columns, as_json=as_json, empty="no keys; `heliostat up` makes one")


@app.command("trust")
def trust(
    path: Annotated[Path, typer.Argument(help="PEM file with an EC P-256 public key.")],
) -> None:
    """Open packages that this key signed, too."""
    from cluster.model_package.pem import read_pem

    fingerprint = _keys().trust(read_pem(path))
    _record("signing_key.trust", fingerprint)
    print(f"trusted {fingerprint}")


@app.command("revoke")
def revoke(
    fingerprint: Annotated[str, typer.Argument(help="Of `models keys list`; 8 digits suffice.")],
    reason: Annotated[str, typer.Option(help="Kept with the key and in the audit log.")],
) -> None:
    """Refuse whatever this key signed, for ever."""
    keys = _keys()
    found = keys.find(fingerprint)
    keys.revoke(found, reason=reason)
    _record("signing_key.revoke", found, reason=reason)
    print(f"revoked {found}; packages that it signed are refused from now on")
    if any(key.is_local and key.fingerprint == found for key in keys.known()):
        print("this machine signs with it: make a new one with `heliostat models keys rotate`")


@app.command("rotate")
def rotate() -> None:
    """Sign with a fresh key from now on; what the old one signed stays good until it is revoked."""
    fingerprint = _keys().rotate_local()
    _record("signing_key.rotate", fingerprint)
    print(f"this machine signs with {fingerprint} from now on")


def _keys() -> SigningKeys:
    from cluster.model_package import SigningKeys

    return SigningKeys(load_settings().keys_dir)


def _record(action: str, fingerprint: str, **detail: str) -> None:
    """After the act: what protects must not wait for the database."""
    from cluster.database import open_database
    from cluster.security.audit import AuditLog

    AuditLog(open_database(load_settings().database)).record(actor(), action, fingerprint, detail)
