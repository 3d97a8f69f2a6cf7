"""`deploy`, `undeploy` and `releases`: what is served, over the gateway's administration routes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from cluster.errors import (
    PASSING_ERRORS,
    ConfigError,
    ConflictError,
    HeliostatError,
    NotFoundError,
    UpstreamTimeoutError,
    UsageError,
)
from cluster.model_ref import ModelRef, check_name
from cluster.settings import load_settings

if TYPE_CHECKING:
    from cluster.admin_client import AdminClient

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]

ResultType = TypeVar("ResultType")

NameArgument = Annotated[str, typer.Argument(help="A model's name.")]

releases_app = typer.Typer(
    help="Releases: states, evidence, timeline; pause, resume, promote, roll back.",
    no_args_is_help=True,
)

_POLL_PERIOD_S = 0.2
_UNDEPLOY_TIMEOUT_S = 90.0
_PATIENCE_S = 60.0
"""What was asked for goes on by itself, so a gateway or controller that restarts is waited for."""
_INTERRUPTED = 130
_GIVEN_UP = {"failed": "failed", "rolled_back": "was rolled back"}
_COLUMNS = ("name", "version", "state", "replicas", "reason", "updated_at")


def register(app: typer.Typer) -> None:
    app.command()(deploy)
    app.command()(undeploy)
    app.add_typer(releases_app, name="releases")


def deploy(
    ref: Annotated[
        str,
        typer.Argument(
            help="NAME (its candidate, or else its newest version), NAME@ALIAS or NAME/VERSION."
        ),
    ],
    strategy: Annotated[
        str,
        typer.Option(
            help="direct: all traffic once it is ready; canary: growing shares, by its evidence; "
            "shadow: mirrored requests first."
        ),
    ] = "direct",
    config: Annotated[
        Path | None, typer.Option(help="YAML file of options, e.g. in configs/serve.")
    ] = None,
    wait: Annotated[bool, typer.Option(help="Wait until it is champion or has failed.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Serve a model version and make it the champion; the one before stays up for rollback.

    With canary and shadow it is compared with the champion first, and rolled back where it is
    worse; docs/releases.md says how that is decided.
    """
    from cluster.config import read_mapping

    ModelRef.parse(ref)
    if not strategy.isascii():
        raise UsageError(
            f"strategy {strategy!r} does not exist", hint="use direct, canary or shadow"
        )
    options = read_mapping(config) if config else {}
    admin = _connect()
    started = time.monotonic()
    try:
        row = admin.deploy(ref, strategy, options)
    except UsageError as error:
        if config is None or not (error.param or "").startswith("options"):
            raise
        raise ConfigError(f"config file '{config}': {error}") from None
    if wait:
        try:
            row = _follow(admin, row, quiet=as_json)
        except KeyboardInterrupt:
            shown = f"see `heliostat releases status {row['name']}`, or end it with `rollback`"
            typer.echo(f"{_ref(row)} goes on without this command; {shown}", err=True)
            raise typer.Exit(_INTERRUPTED) from None
    if as_json:
        print(json.dumps(row, indent=2))
    elif wait:
        print(f"{_ref(row)} is champion after {time.monotonic() - started:.1f} s")
    else:
        print(f"{_ref(row)} is {row['state']}; see `heliostat releases status {row['name']}`")


def undeploy(
    name: Annotated[str, typer.Argument(help="A model's name.")],
    version: Annotated[int | None, typer.Option(min=1, help="Only this version.")] = None,
    notice: Annotated[
        str | None,
        typer.Option(
            help="Answer until then, telling users: 7d, 12h or a moment. Afterwards they get 410."
        ),
    ] = None,
    wait: Annotated[bool, typer.Option(help="Wait until its replicas are gone.")] = True,
) -> None:
    """Take a model out of service; its versions stay in the registry.

    Without its champion, the version that stands by goes on; without a version, all end.
    """
    from cluster.cli.moments import parse_notice

    check_name(name)
    notice_s = parse_notice(notice)
    admin = _connect()
    before = _champion(admin.deployments(), name)
    rows = admin.undeploy(name, version, notice_s)
    what, after = name if version is None else f"{name}/{version}", _champion(rows, name)
    sunset = min((row["sunset_at"] for row in rows if _ends_later(row, version)), default=None)
    if sunset is not None:
        print(f"{what} is served until {sunset}")
        return
    if wait:
        _wait_until_gone(admin, name, version)
    print(f"{what} is no longer served")
    if after is not None and after != before:
        print(f"{name}/{after} is champion again")


@releases_app.command("list")
def list_releases(as_json: JsonOption = False) -> None:
    """Every deployed version with its state."""
    from cluster.cli.output import print_table

    empty = "nothing is deployed; `heliostat deploy NAME` does it"
    rows = _connect().deployments()
    shown = rows if as_json else [{**row, "state": _shown(row)} for row in rows]
    print_table(shown, _COLUMNS, as_json=as_json, empty=empty)


@releases_app.command("status")
def status(
    name: Annotated[str, typer.Argument(help="A model's name.")], as_json: JsonOption = False
) -> None:
    """One model's versions and traffic, what the release under way has shown, and its timeline."""
    from cluster.cli.output import print_table

    check_name(name)
    release = _connect().release(name)
    if as_json:
        print(json.dumps(release, indent=2))
        return
    shares = (f"version {v}: {weight:.0%}" for v, weight in release["weights"].items())
    print(f"traffic   {', '.join(shares) or 'none'}\n")
    rows = [{**row, "state": _shown(row)} for row in release["deployments"]]
    print_table(rows, _COLUMNS[1:], as_json=False, empty="nothing is deployed")
    if release["evidence"]:
        print()
        columns = ("stage", "metric", "arm", "num", "mean")
        rows = [{**line, "mean": f"{line['mean']:.4f}"} for line in release["evidence"]]
        print_table(rows, columns, as_json=False, empty="")
    print()
    columns = ("at", "version", "state", "actor", "reason")
    print_table(release["timeline"], columns, as_json=False, empty="nothing was ever released")


@releases_app.command("pause")
def pause(name: NameArgument) -> None:
    """Let the release under way take no further step; what is worse is still rolled back."""
    _steer(name, "pause")


@releases_app.command("resume")
def resume(name: NameArgument) -> None:
    """Let a paused release go on."""
    _steer(name, "resume")


@releases_app.command("promote")
def promote(name: NameArgument) -> None:
    """Make the version that is compared with the champion the champion, at once."""
    _steer(name, "promote")


@releases_app.command("rollback")
def rollback(name: NameArgument) -> None:
    """End the release under way; without one, give the traffic back to the champion before."""
    _steer(name, "rollback")


def _steer(name: str, verb: str) -> None:
    check_name(name)
    row = _connect().steer(name, verb)
    again = " again" if verb == "rollback" and row["state"] == "champion" else ""
    print(f"{_ref(row)} is {_shown(row)}{again} ({row['reason']})")


def _connect() -> AdminClient:
    from cluster.admin_client import AdminClient

    return AdminClient.open(load_settings())


def _follow(admin: AdminClient, row: dict[str, Any], *, quiet: bool) -> dict[str, Any]:
    """Show each state until the last one.

    Raises:
        HeliostatError: it failed; the message is the replica's own reason.
    """
    shown = ""
    while True:
        line = f"{_ref(row)}  {_shown(row):<10} {row['reason']}"
        if line != shown and row["state"] not in _GIVEN_UP and not quiet:
            print(line, flush=True)
            shown = line
        if row["state"] in ("champion", "standby"):
            return row
        if row["state"] in _GIVEN_UP:
            raise HeliostatError(f"{_ref(row)} {_GIVEN_UP[row['state']]}: {row['reason']}")
        time.sleep(_POLL_PERIOD_S)
        try:
            row = _patiently(partial(admin.deployment, row["name"], row["version"]))
        except NotFoundError:
            raise ConflictError(f"{_ref(row)} was undeployed meanwhile") from None


def _patiently(ask: Callable[[], ResultType]) -> ResultType:
    """An answer, also where whoever gives it is away for a while."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return ask()
        except PASSING_ERRORS:
            if time.monotonic() > deadline:
                raise
            time.sleep(_POLL_PERIOD_S)


def _champion(rows: Sequence[Mapping[str, Any]], name: str) -> int | None:
    found = (row["version"] for row in rows if row["name"] == name and row["state"] == "champion")
    return next(found, None)


def _wait_until_gone(admin: AdminClient, name: str, version: int | None) -> None:
    deadline = time.monotonic() + _UNDEPLOY_TIMEOUT_S
    while any(
        row["name"] == name and version in (None, row["version"]) and row["state"] != "retired"
        for row in _patiently(admin.deployments)
    ):
        if time.monotonic() > deadline:
            raise UpstreamTimeoutError(
                f"'{name}' takes no more requests, but its replicas are still ending",
                hint="see `heliostat releases list`",
            )
        time.sleep(_POLL_PERIOD_S)


def _ends_later(row: Mapping[str, Any], version: int | None) -> bool:
    is_up = row["state"] not in ("retiring", "retired")
    return is_up and version in (None, row["version"]) and bool(row.get("sunset_at"))


def _shown(row: Mapping[str, Any]) -> str:
    """Its state; a canary's with its share of the traffic."""
    share = f" {row['share']:.0%}" if row["state"] == "canary" and "share" in row else ""
    return f"{row['state'].replace('_', ' ')}{share}{' (paused)' if row.get('is_paused') else ''}"


def _ref(row: Mapping[str, Any]) -> str:
    return f"{row['name']}/{row['version']}"
