"""The local stack as its users meet it: started, asked, hurt, started again, stopped."""

from __future__ import annotations

import ipaddress
import json
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import psutil
import pytest
import tritonclient.grpc as triton

from cluster.cli.live_load import LiveLoad
from cluster.session.ports import PORTS, is_free
from cluster.session.processes import find
from cluster.session.record import read_record
from tests.live_releases import LABELS, NAME, ROWS, Releases, go_on
from tests.stack import ROOT, Stack, new_stack

pytestmark = pytest.mark.stack


def listeners(stack: Stack) -> dict[tuple[str, int], psutil.Process]:
    """(address, port) of every listening TCP socket of the stack, with its process."""
    found = {}
    for process in find(stack.settings.home):
        for connection in process.net_connections(kind="tcp"):
            if connection.status == psutil.CONN_LISTEN:
                found[connection.laddr[0], connection.laddr[1]] = process
    return found


def is_loopback(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    mapped = getattr(parsed, "ipv4_mapped", None)
    return (mapped or parsed).is_loopback


def call_without_key(port: int, method: str) -> grpc.StatusCode:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary(method)
        with pytest.raises(grpc.RpcError) as caught:
            call(b"", timeout=10)
    code: grpc.StatusCode = caught.value.code()
    return code


def wait_until_ready(stack: Stack) -> None:
    deadline_s = time.monotonic() + 60
    while stack.run_cli("status").returncode != 0:
        assert time.monotonic() < deadline_s, stack.run_cli("status").stdout
        time.sleep(0.2)


def test_status_lists_every_endpoint_as_ready(stack: Stack) -> None:
    run = stack.run_cli("status", "--json")
    assert run.returncode == 0, run.stdout
    status = json.loads(run.stdout)
    assert status["ready"] is True
    names = {endpoint["name"] for endpoint in status["endpoints"] if endpoint["ready"]}
    assert names == {"gateway", "controller", "mlflow", "ray-dashboard"}


def test_a_second_up_starts_nothing_and_prints_the_card(stack: Stack) -> None:
    before = read_record(stack.settings.home)
    run = stack.run_cli("up")
    assert run.returncode == 0, run.stderr
    assert read_record(stack.settings.home) == before
    assert "ready after" not in run.stdout
    assert stack.settings.gateway_url in run.stdout
    assert stack.key in run.stdout


def test_up_refuses_other_settings_while_it_runs(stack: Stack) -> None:
    config = stack.settings.home.parent / "other.yaml"
    config.write_text("num_cpus: 1\n")
    run = stack.run_cli("up", "--config", config)
    assert run.returncode == 1
    assert run.stderr.count("\n") == 1
    assert "num_cpus" in run.stderr
    assert "heliostat down" in run.stderr


def test_env_is_all_that_rays_own_command_needs(stack: Stack) -> None:
    ray = shlex.quote(str(Path(sys.executable).parent / "ray"))
    exports = stack.run_cli("env").stdout
    run = subprocess.run(
        ["bash", "-c", f'{exports}\n{ray} job list && curl -sf "$OPENAI_BASE_URL/models" '
         '-H "Authorization: Bearer $OPENAI_API_KEY"'],
        env={"PATH": "/usr/bin:/bin", "HOME": str(stack.settings.home)},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert json.loads(run.stdout.splitlines()[-1])["object"] == "list"


def test_every_socket_is_on_loopback_or_refuses_calls_without_a_key(stack: Stack) -> None:
    found = listeners(stack)
    ports = {port for _, port in found}
    known = {stack.settings.gateway_port, stack.settings.grpc_port, stack.settings.ray_port}
    assert known <= ports, "the list is complete"
    for (address, port), process in found.items():
        if not is_loopback(address):
            # Serve's calls between replicas: the only server whose address cannot be chosen.
            code = call_without_key(port, "/ray.serve.ASGIService/HandleRequest")
            assert code is grpc.StatusCode.UNAUTHENTICATED, f"{process.name()} on {address}:{port}"


def test_grpc_refuses_calls_without_a_key(stack: Stack) -> None:
    """The gateway's own server; Ray Serve's, which would answer on every interface, is off."""
    port = stack.settings.grpc_port
    addresses = {address for address, found in listeners(stack) if found == port}
    assert addresses
    assert all(is_loopback(address) for address in addresses)
    for method in ("ModelInfer", "ModelStreamInfer", "ModelMetadata", "ServerMetadata", "None"):
        code = call_without_key(port, f"/inference.GRPCInferenceService/{method}")
        assert code is grpc.StatusCode.UNAUTHENTICATED, method
    with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
        assert client.is_server_ready()
        headers = {"authorization": f"Bearer {stack.key}"}
        assert client.get_server_metadata(headers=headers).name == "heliostat"


def test_ray_refuses_calls_without_its_token(stack: Stack) -> None:
    settings = stack.settings
    code = call_without_key(settings.ray_port, "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo")
    assert code is grpc.StatusCode.UNAUTHENTICATED
    for method, path in (
        ("GET", "/api/version"),
        ("GET", "/api/jobs/"),
        ("POST", "/api/jobs/"),
        ("PUT", "/api/serve/applications/"),
        ("DELETE", "/api/serve/applications/"),
    ):
        answer = httpx.request(method, settings.dashboard_url + path)
        assert answer.status_code in (401, 403), f"{method} {path}"


def test_replicas_own_ports_serve_nobody_without_a_key(stack: Stack) -> None:
    """Serve opens one for each application, beside HAProxy's."""
    first = stack.settings.replica_port_min
    own = [port for _, port in listeners(stack) if first <= port < first + 100]
    assert own
    for port in own:
        answer = httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=10)
        assert answer.status_code >= 400


def test_files_that_hold_secrets_are_private(stack: Stack) -> None:
    settings = stack.settings
    for path in (settings.home, settings.keys_dir, settings.home / "run"):
        assert path.stat().st_mode & 0o077 == 0, path
    for path in (settings.ray_token_path, settings.api_key_path):
        assert path.stat().st_mode & 0o077 == 0, path


def test_a_killed_gateway_comes_back(stack: Stack) -> None:
    (replica,) = [p for p in find(stack.settings.home) if "ServeReplica:gateway" in p.name()]
    replica.kill()
    wait_until_ready(stack)
    answer = httpx.get(
        f"{stack.settings.gateway_url}/v1/models", headers={"Authorization": f"Bearer {stack.key}"}
    )
    assert answer.status_code == 200


@pytest.fixture
def second_stack(short_dir: Path) -> Iterator[Stack]:
    directory = short_dir / str(len(list(short_dir.iterdir())))
    directory.mkdir()
    second = new_stack(directory)
    yield second
    second.run_cli("down")


def test_an_occupied_port_is_named_before_anything_starts(second_stack: Stack) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", second_stack.settings.mlflow_port))
        taken.listen()
        run = second_stack.up()
    assert run.returncode == 1
    assert run.stderr.count("\n") == 1
    assert f"port {second_stack.settings.mlflow_port} (mlflow_port) is in use" in run.stderr
    assert "HELIOSTAT_MLFLOW_PORT" in run.stderr
    assert find(second_stack.settings.home) == []


def test_a_stack_survives_the_death_of_its_head_and_leaves_nothing_when_stopped(
    stack: Stack, second_stack: Stack, tmp_path: Path
) -> None:
    """Beside the session's stack, which it must not touch."""
    neighbours = {process.pid for process in find(stack.settings.home)}
    home = second_stack.settings.home
    assert second_stack.up().returncode == 0
    releases = Releases(second_stack, tmp_path)
    releases.begin()
    before = releases.reached(1, "champion")
    head = read_record(home).parts["ray"]
    psutil.Process(head.pid).kill()

    again = second_stack.run_cli("up")
    assert again.returncode == 0, again.stderr
    assert read_record(home).parts["ray"] != head
    assert "MLflow server" not in again.stdout, "it had not died"
    with LiveLoad(second_stack.settings, NAME, ROWS, LABELS) as load:
        go_on(load)  # nobody has deployed the model again
    assert releases.reached(1, "champion").release_id == before.release_id
    ports = {port for _, port in listeners(second_stack)}

    down = second_stack.run_cli("down")
    assert down.returncode == 0, down.stderr
    assert find(home) == []
    assert [port for port in sorted(ports) if not is_free(port)] == []
    assert second_stack.run_cli("status").returncode == 1
    assert second_stack.run_cli("down").returncode == 0
    assert neighbours <= {process.pid for process in find(stack.settings.home)}


def test_ports_of_the_settings_are_the_ports_that_listen(stack: Stack) -> None:
    ports = {port for _, port in listeners(stack)}
    for name in (name for part in PORTS.values() for name in part):
        assert getattr(stack.settings, name) in ports, name


def test_the_card_tells_how_to_stop(stack: Stack) -> None:
    assert f"HELIOSTAT_HOME={stack.settings.home} heliostat down" in stack.run_cli("up").stdout
    assert ROOT not in stack.settings.home.parents
