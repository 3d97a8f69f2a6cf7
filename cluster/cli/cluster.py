"""`up`, `down`, `status`, `env`, `doctor`, `demo`: the local stack as a whole."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.errors import NotRunningError
from cluster.settings import load_settings, load_settings_file

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def register(app: typer.Typer) -> None:
    for verb in (up, down, status, env, doctor, demo):
        app.command()(verb)


def up(
    config: Annotated[
        Path | None, typer.Option(help="YAML file of settings; they are remembered.")
    ] = None,
) -> None:
    """Start the local cluster, or what is missing of it, and print where everything is."""
    from cluster.session.card import card
    from cluster.session.up import up as start

    settings = load_settings_file(config) if config else load_settings()
    start(settings, _say)
    _say(card(settings))


def down() -> None:
    """Stop the local cluster: everything that `up` started, and nothing else."""
    from cluster.session.down import down as stop

    stop(load_settings(), _say)


def status(as_json: JsonOption = False) -> None:
    """Ask every endpoint whether it is ready; exit code 1 if one is not."""
    from cluster.cli.output import print_table
    from cluster.session.status import endpoints

    settings = load_settings()
    found = endpoints(settings)
    all_ready = all(endpoint.ready for endpoint in found)
    rows = [vars(endpoint) for endpoint in found]
    if as_json:
        values = {"ready": all_ready, "home": str(settings.home), "endpoints": rows}
        print(json.dumps(values, indent=2))
    else:
        shown = [{**row, "ready": "ready" if row["ready"] else "not ready"} for row in rows]
        print_table(shown, ("name", "ready", "url", "detail"), as_json=False, empty="")
    if not all_ready:
        raise typer.Exit(1)


def env() -> None:
    """Print `export` lines for this shell: eval "$(heliostat env)"."""
    from cluster.session.environment import client_environment

    settings = load_settings()
    try:
        variables = client_environment(settings)
    except FileNotFoundError:
        raise NotRunningError(
            f"no cluster was ever started in {settings.home}", hint="run `heliostat up`"
        ) from None
    for name, value in variables.items():
        print(f"export {name}={shlex.quote(value)}")


def doctor(as_json: JsonOption = False) -> None:
    """Examine this machine; exit code 1 if something must be repaired."""
    from cluster.cli.output import print_table
    from cluster.session.doctor import examine

    checks = examine(load_settings())
    rows: list[dict[str, Any]] = [vars(check) for check in checks]
    shown = rows if as_json else [{**row, "ok": "ok" if row["ok"] else "PROBLEM"} for row in rows]
    print_table(shown, ("name", "ok", "found", "next_step"), as_json=as_json, empty="")
    if not all(check.ok for check in checks):
        raise typer.Exit(1)


def demo(
    fast: Annotated[
        bool, typer.Option(help="Only to see the plumbing: few steps, little evidence.")
    ] = False,
    release: Annotated[
        bool,
        typer.Option(
            help="Instead: under load, a good version is released, a bad one rolled back."
        ),
    ] = False,
) -> None:
    """Train, package, deploy and call two models on this machine."""
    if release:
        from cluster.cli.demo_release import run_release_demo

        run_release_demo(fast=fast)
        return
    from cluster.cli.demo import run_demo

    run_demo(fast=fast)


def _say(line: str) -> None:
    print(line, flush=True)
