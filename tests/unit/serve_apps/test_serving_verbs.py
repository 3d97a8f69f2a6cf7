"""`deploy`, `undeploy` and `releases` against a real HTTP server with a scripted controller."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from typer.testing import CliRunner

from cluster.cli import serving
from cluster.cli.app import app
from cluster.errors import (
    ConflictError,
    HeliostatError,
    NotFoundError,
    NotRunningError,
    OverloadedError,
    UpstreamFailedError,
    UpstreamTimeoutError,
    UsageError,
)


class Verbs:
    """Runs the command line against the gateway under test."""

    def __init__(self, home: Path, port: int) -> None:
        self.environment = {"HELIOSTAT_HOME": str(home), "HELIOSTAT_GATEWAY_PORT": str(port)}

    async def run(self, *arguments: str) -> Any:
        return await asyncio.to_thread(
            CliRunner().invoke, app, list(arguments), env=self.environment
        )


@pytest.fixture
async def verbs(gateway: Any, tmp_path: Path) -> AsyncIterator[Verbs]:
    server = uvicorn.Server(
        uvicorn.Config(gateway.app, port=0, log_level="warning", lifespan="off")
    )
    serving = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    key = gateway.headers("admin")["authorization"].removeprefix("Bearer ")
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "api_key").write_text(key)
    yield Verbs(tmp_path, server.servers[0].sockets[0].getsockname()[1])
    server.should_exit = True
    await serving


def script(gateway: Any, *states: str, reason: str = "because") -> None:
    """Let the deployment go through these states, one each time it is asked for."""
    rows = [{"name": "classes", "version": 1, "state": state, "reason": reason} for state in states]

    async def deployments(name: str | None) -> list[dict[str, Any]]:
        return [rows.pop(0)] if rows else []

    gateway.control.deployments = deployments


async def test_deploy_shows_each_state_until_the_champion(gateway: Any, verbs: Verbs) -> None:
    script(gateway, "warming", "warming", "parity", "champion")
    result = await verbs.run("deploy", "classes")
    assert result.exit_code == 0, result.output
    *steps, last = result.stdout.splitlines()
    assert [line.split()[1] for line in steps] == ["deploying", "warming", "parity", "champion"]
    assert "is champion after" in last


async def test_a_failed_deploy_is_one_line_with_the_replicas_reason(
    gateway: Any, verbs: Verbs
) -> None:
    script(gateway, "failed", reason="golden outputs are not reproduced")
    result = await verbs.run("deploy", "classes")
    assert isinstance(result.exception, HeliostatError)
    assert str(result.exception) == "classes/1 failed: golden outputs are not reproduced"


async def test_options_come_from_a_file(gateway: Any, verbs: Verbs, tmp_path: Path) -> None:
    config = tmp_path / "options.yaml"
    config.write_text("num_replicas: 3\n")
    result = await verbs.run("deploy", "classes", "--config", str(config), "--no-wait", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["state"] == "deploying"
    assert gateway.control.calls[-1][:4] == ("deploy", "classes", "direct", {"num_replicas": 3})


async def test_undeploy_waits_until_it_is_gone(gateway: Any, verbs: Verbs) -> None:
    script(gateway, "retiring", "retiring")
    result = await verbs.run("undeploy", "classes", "--version", "1")
    assert result.exit_code == 0, result.output
    assert gateway.control.calls[-1][:3] == ("undeploy", "classes", 1)


async def test_undeploying_with_notice_says_until_when_and_does_not_wait(
    gateway: Any, verbs: Verbs
) -> None:
    async def undeploy(*asked: Any) -> list[dict[str, Any]]:
        gateway.control.calls.append(asked)
        sunset_at = "2030-01-08T00:00:00.000+00:00"
        return [{"name": "classes", "version": 1, "state": "champion", "sunset_at": sunset_at}]

    gateway.control.undeploy = undeploy
    result = await verbs.run("undeploy", "classes", "--notice", "7d")
    assert result.stdout == "classes is served until 2030-01-08T00:00:00.000+00:00\n"
    assert gateway.control.calls[-1][:3] == ("classes", None, 7 * 86_400)
    late = await verbs.run("undeploy", "classes", "--notice", "2020-01-01")
    assert "is over already" in str(late.exception)
    long = await verbs.run("undeploy", "classes", "--notice", "999999d")
    assert "is longer than 30 years" in str(long.exception)


async def test_a_version_that_is_rolled_back_is_one_line_with_the_numbers(
    gateway: Any, verbs: Verbs
) -> None:
    script(gateway, "canary", "rolled_back", reason="errors 30.0% of 40: worse")
    result = await verbs.run("deploy", "classes", "--strategy", "canary")
    assert str(result.exception) == "classes/1 was rolled back: errors 30.0% of 40: worse"
    assert gateway.control.calls[-1][2] == "canary"


async def test_undeploying_a_champion_says_who_goes_on(gateway: Any, verbs: Verbs) -> None:
    async def undeploy(
        name: str, version: int | None, notice_s: int | None, actor: str
    ) -> list[dict[str, Any]]:
        states = {1: "champion", 2: "retiring"}
        return [{"name": name, "version": v, "state": state} for v, state in states.items()]

    gateway.control.undeploy = undeploy
    rows = [{"name": "classes", "version": 2, "state": "champion"}]

    async def deployments(name: str | None) -> list[dict[str, Any]]:
        return rows

    gateway.control.deployments = deployments
    result = await verbs.run("undeploy", "classes", "--version", "2", "--no-wait")
    assert result.stdout.splitlines() == [
        "classes/2 is no longer served",
        "classes/1 is champion again",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("autoscaling: {look_back_s: .inf}", "'autoscaling.look_back_s' is inf"),
        ("num_cpus: .nan", "'num_cpus' is nan"),
        ("num_cpus: 2020-01-01", "option 'num_cpus' is '2020-01-01': input should be"),
        ("max_running: !!binary aGVsbG8=", "at line 1: there is a value of type .*binary"),
        ("autoscaling: &a\n  again: *a", "nested too deeply"),
        ('max_running: "\\ud800"', "'max_running' holds a character that is no text"),
        ("autoscaling: {1: 2, max_replicas: 2}", "option 'autoscaling.1' is not known"),
        ("max_running: 1" + "0" * 30, "'max_running' is a number of more than 64 bits"),
    ],
)
async def test_a_config_that_makes_no_sense_is_one_line(
    verbs: Verbs, tmp_path: Path, text: str, words: str
) -> None:
    config = tmp_path / "options.yaml"
    config.write_text(text)
    result = await verbs.run("deploy", "classes", "--config", str(config), "--no-wait")
    assert isinstance(result.exception, UsageError)
    assert re.search(f"config file '{config}'.*{words}", str(result.exception))
    assert "\n" not in str(result.exception)


@pytest.mark.parametrize(
    "arguments",
    [
        ("deploy", "cl\udcff"),
        ("deploy", "classes", "--strategy", "\udcff"),
        ("undeploy", "../keys?x"),
        ("releases", "status", "a/b"),
        ("releases", "rollback", "\udcff"),
    ],
)
async def test_what_is_no_name_is_refused_before_anything_is_asked(
    verbs: Verbs, arguments: tuple[str, ...]
) -> None:
    result = await verbs.run(*arguments)
    assert isinstance(result.exception, UsageError)


async def test_releases_are_listed_shown_and_rolled_back(gateway: Any, verbs: Verbs) -> None:
    listed = await verbs.run("releases", "list", "--json")
    assert json.loads(listed.stdout)[0]["name"] == "classes"
    shown = await verbs.run("releases", "status", "classes")
    assert "version 1: 100%" in shown.stdout
    assert "label_disagreement" in shown.stdout
    assert "no worse in 412 requests" in shown.stdout
    for verb, says in [
        ("pause", "is canary (asked to pause)"),
        ("resume", "is canary (asked to resume)"),
        ("promote", "is champion (asked to promote)"),
        ("rollback", "is champion again (asked to rollback)"),
    ]:
        done = await verbs.run("releases", verb, "classes")
        assert done.exit_code == 0, done.output
        assert done.stdout.strip() == f"classes/1 {says}"
        assert gateway.control.calls[-1][:2] == (verb, "classes")


async def test_the_gateways_errors_are_the_command_lines(gateway: Any, verbs: Verbs) -> None:
    gateway.control.error = ConflictError("version 2 is being deployed", hint="wait")
    result = await verbs.run("deploy", "classes")
    assert isinstance(result.exception, ConflictError)
    assert str(result.exception) == "version 2 is being deployed; wait"
    missing = await verbs.run("releases", "status", "none")
    assert isinstance(missing.exception, NotFoundError)


async def test_a_stopped_cluster_is_named_with_the_way_to_start_it(tmp_path: Path) -> None:
    nothing = Verbs(tmp_path, 1)
    result = await nothing.run("releases", "list")
    assert isinstance(result.exception, NotRunningError)
    assert str(result.exception) == "heliostat is not running; run `heliostat up`"
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "api_key").write_text("hst_x")
    result = await nothing.run("deploy", "x")
    assert str(result.exception) == "heliostat is not running; run `heliostat up`"


async def test_deploy_waits_for_a_controller_that_restarts(gateway: Any, verbs: Verbs) -> None:
    errors = [UpstreamFailedError("gone"), OverloadedError("full"), UpstreamTimeoutError("silent")]

    async def deployments(name: str | None) -> list[dict[str, Any]]:
        if errors:
            raise errors.pop()
        return [{"name": "classes", "version": 1, "state": "champion", "reason": "because"}]

    gateway.control.deployments = deployments
    result = await verbs.run("deploy", "classes")
    assert result.exit_code == 0, result.output
    assert "is champion after" in result.stdout


async def test_who_stops_waiting_is_told_that_the_release_goes_on(
    gateway: Any, verbs: Verbs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(serving, "_follow", interrupted)
    result = await verbs.run("deploy", "classes")
    assert result.exit_code == 130
    assert result.stderr.startswith("classes/1 goes on without this command; see `heliostat rel")
