"""The gateway beside its peers: one small MLP (100-64-64-1) over HTTP, on one machine.

Ours is the whole stack as `heliostat up` starts it: HAProxy, a gateway, a predictor; keys, limits,
metering and metrics on. LitServe with dynamic batching, Ray Serve's defaults with `@serve.batch`,
and FastAPI with torch in one process answer the same question (see `gateway_peers`). All are up
throughout; one at a time is under load, in rounds whose order alternates, from the same client.

    python -m benchmarks.run gateway
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import psutil
import torch

from benchmarks.gateway_cost import cost_pairs
from benchmarks.gateway_peers.mlp import NUM_FEATURES, make_mlp
from benchmarks.http_load import Figures, HttpLoad
from benchmarks.measure import Row, row_of
from tests.replica_processes import cpu_seconds, replicas
from tests.stack import Stack, new_stack

ROUNDS = 5
SECONDS = 5.0
_CONNECTIONS = 64
_WARM_UP_S = 3.0
_START_TIMEOUT_S = 120.0
_MODEL = "mlp"
_PEERS = {
    "litserve": "LitServe, dynamic batching",
    "ray_serve": "Ray Serve's defaults, @serve.batch",
    "fastapi": "FastAPI + torch, one process",
}


def measure() -> tuple[Row, ...]:
    directory = Path(tempfile.mkdtemp(prefix="hst"))
    stack = new_stack(directory)
    # Tests have it on; by default it is off.
    stack = replace(stack, settings=stack.settings.model_copy(update={"access_log": False}))
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(shutil.rmtree, directory, ignore_errors=True)
        cleanup.callback(stack.run_cli, "down")
        _serve_mlp(stack, directory)
        loads = {"ours": _our_load(stack)}
        for name in _PEERS:
            loads[name] = cleanup.enter_context(_peer(name, directory / name))
        return tuple(_compare(loads, stack))


def _compare(loads: dict[str, HttpLoad], stack: Stack) -> Iterator[Row]:
    for load in loads.values():
        load.run(connections=_CONNECTIONS, seconds=_WARM_UP_S)
    many = _rounds(loads, _CONNECTIONS)
    goals = {"litserve": 2.5, "ray_serve": 6.0, "fastapi": 0.7}
    for name, goal in goals.items():
        yield row_of(
            f"requests/s at {_CONNECTIONS} connections",
            pairs=_pairs(many, name, "requests_per_s"),
            peer_name=_PEERS[name],
            at_least=goal,
            note=f"p99 {_median(many['ours'], 'p99_ms'):.0f} ms against "
            f"{_median(many[name], 'p99_ms'):.0f} ms ({_PEERS[name]}); CPU per request "
            f"{_cpu_ms(many['ours']):.2f} ms against {_cpu_ms(many[name]):.2f} ms, client included",
        )
    whole = _gateway_us(stack, loads["ours"])
    alone = cost_pairs(rounds=ROUNDS)
    one = _rounds({name: loads[name] for name in ("ours", "ray_serve")}, 1)
    yield row_of(
        "p50 in ms at 1 connection",
        pairs=_pairs(one, "ray_serve", "p50_ms"),
        peer_name=_PEERS["ray_serve"],
        at_most=0.3,
    )
    yield row_of(
        f"µs of the gateway's CPU per request at {_CONNECTIONS} connections, with keys, limits, "
        "metering and metrics",
        pairs=[(whole, whole - (with_them - without)) for with_them, without in alone],
        peer_name="without them: less what they add in a process without sockets and Serve",
        at_most=1.15,
        note=f"there {alone[0][1]:.0f} µs become {alone[0][0]:.0f}",
    )
    clients = [(_triton("grpc", stack), _triton("http", stack)) for _ in range(ROUNDS)]
    yield row_of(
        f"requests/s over gRPC, {_CONNECTIONS} at once",
        pairs=clients,
        peer_name="ours over HTTP, binary tensors, the same client",
        at_least=0.9,
        note="both through tritonclient's asyncio clients, which cost more than the gateway",
    )


Measured = tuple[Figures, float]
"""A run, and the machine's busy CPU seconds meanwhile."""


def _rounds(loads: dict[str, HttpLoad], connections: int) -> dict[str, list[Measured]]:
    found: dict[str, list[Measured]] = {name: [] for name in loads}
    for index in range(ROUNDS):
        names = list(loads) if index % 2 == 0 else list(reversed(loads))
        for name in names:
            before = _busy_s()
            figures = loads[name].run(connections=connections, seconds=SECONDS)
            found[name].append((figures, _busy_s() - before))
            print(f"{name}: {figures}", flush=True)
    return found


def _pairs(found: dict[str, list[Measured]], peer: str, what: str) -> Sequence[tuple[float, float]]:
    return [
        (getattr(ours, what), getattr(theirs, what))
        for (ours, _), (theirs, _) in zip(found["ours"], found[peer], strict=True)
    ]


def _median(found: list[Measured], what: str) -> float:
    return statistics.median(getattr(figures, what) for figures, _ in found)


def _cpu_ms(found: list[Measured]) -> float:
    return 1e3 * statistics.median(busy_s / figures.requests for figures, busy_s in found)


def _gateway_us(stack: Stack, load: HttpLoad) -> float:
    """Microseconds of CPU that the gateway's process takes for a request under load."""
    (gateway,) = replicas(stack, "gateway", 1)
    before_s = cpu_seconds(gateway)
    figures = load.run(connections=_CONNECTIONS, seconds=SECONDS)
    return 1e6 * (cpu_seconds(gateway) - before_s) / figures.requests


def _busy_s() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait)


def _serve_mlp(stack: Stack, directory: Path) -> None:
    graph = directory / "mlp.onnx"
    torch.onnx.export(
        make_mlp(),
        (torch.zeros(2, NUM_FEATURES),),
        graph,
        input_names=["inputs"],
        output_names=["output"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        verbose=False,
    )
    for command in (
        ("models", "import", graph, "--name", _MODEL),
        ("deploy", _MODEL),
    ):
        done = stack.up() if command[0] == "models" else None
        if done is not None and done.returncode:
            raise RuntimeError(f"the stack did not start: {done.stderr}")
        done = stack.run_cli(*command)
        if done.returncode:
            raise RuntimeError(f"{command}: {done.stderr}")


def _our_load(stack: Stack) -> HttpLoad:
    tensor = {"name": "inputs", "datatype": "FP32", "shape": [1, NUM_FEATURES], "data": _features()}
    return HttpLoad(
        f"{stack.settings.gateway_url}/v2/models/{_MODEL}/infer",
        json.dumps({"inputs": [tensor]}).encode(),
        {"authorization": f"Bearer {stack.key}"},
    )


@contextlib.contextmanager
def _peer(name: str, directory: Path) -> Iterator[HttpLoad]:
    """A peer in a process of its own, with nothing of our stack's environment."""
    port = _free_port()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "HELIOSTAT_"))}
    search_path = [os.getcwd()]  # noqa: PTH109
    if name == "litserve":
        search_path.insert(0, _installed(directory, "litserve"))
    environment["PYTHONPATH"] = os.pathsep.join(search_path)
    command = [sys.executable, "-m", f"benchmarks.gateway_peers.{name}_peer", str(port)]
    log = directory.with_suffix(".log")
    with log.open("wb") as output:
        process = psutil.Popen(command, env=environment, stdout=output, stderr=output)
        try:
            load = HttpLoad(
                f"http://127.0.0.1:{port}/predict", json.dumps({"inputs": _features()}).encode(), {}
            )
            _wait(load, process, log)
            yield load
        finally:
            family: list[psutil.Process] = []
            if process.is_running():
                family = [*process.children(recursive=True), process]
            for member in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.terminate()
            _, left = psutil.wait_procs(family, timeout=10)
            for member in left:
                member.kill()


def _installed(directory: Path, requirement: str) -> str:
    """A throw-away folder with a library that our own pins would clash with."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(directory)]
    constraint = directory.with_suffix(".txt")
    constraint.write_text(f"torch=={torch.__version__.split('+')[0]}\n", encoding="utf-8")
    subprocess.run([*command, "--constraint", str(constraint), requirement], check=True)
    return str(directory)


def _wait(load: HttpLoad, process: psutil.Popen, log: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    headers = {"content-type": "application/json"}
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.post(load.url, content=load.body, headers=headers).is_success:
                return
        if process.poll() is not None:
            break
        time.sleep(0.5)
    raise RuntimeError(f"{load.url} does not answer: {log.read_text(errors='replace')[-500:]}")


def _triton(protocol: str, stack: Stack) -> float:
    """Requests per second of a client of its own process."""
    settings = stack.settings
    port = settings.grpc_port if protocol == "grpc" else settings.gateway_port
    found = subprocess.run(
        [sys.executable, "-m", "benchmarks.triton_load", protocol, f"127.0.0.1:{port}", _MODEL,
         str(_CONNECTIONS), str(SECONDS)],
        env={**os.environ, "HELIOSTAT_API_KEY": stack.key},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return float(found.stdout)


def _features() -> list[float]:
    return [round(float(x), 4) for x in np.random.default_rng(0).normal(size=NUM_FEATURES)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
