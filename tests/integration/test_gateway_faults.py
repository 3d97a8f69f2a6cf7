"""Parts of serving are killed, stopped and leant on while clients ask; who notices is counted."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import shutil
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest

from cluster.cli.live_load import LiveLoad
from tests.live_releases import LABELS, NAME, ROWS, Releases, go_on
from tests.replica_processes import cpu_seconds, processes, replicas
from tests.serving_load import INFER, NUM_SLOW, body_of, connect, head_of, save_work, slow_clients
from tests.stack import Stack, new_stack
from tests.tiny_models import save_llama
from tests.worker_node import WorkerNode

pytestmark = [pytest.mark.stack, pytest.mark.timeout(180)]

logger = logging.getLogger(__name__)

MAX_CONNECTIONS_PER_CLIENT = NUM_SLOW + 50


@pytest.fixture(scope="module")
def busy_stack() -> Iterator[Stack]:
    """Two gateways before a graph of two replicas, and a language model."""
    directory = Path(tempfile.mkdtemp(prefix="hst"))
    plain = new_stack(directory, num_cpus=1)
    stack = dataclasses.replace(
        plain,
        settings=plain.settings.model_copy(
            update={
                "gateway_replicas": 2,
                "max_connections_per_client": MAX_CONNECTIONS_PER_CLIENT,
            }
        ),
    )
    try:
        up = stack.up()
        assert up.returncode == 0, up.stderr
        save_work(directory / "work.onnx")
        talker = save_llama(directory / "talker", "on and on", max_position_embeddings=8192)
        options = directory / "options.yaml"
        options.write_text("num_replicas: 2\nrequest_timeout_s: 60\n")
        with ThreadPoolExecutor(2) as pool:
            work = pool.submit(put_up, stack, "work", directory / "work.onnx", options)
            put_up(stack, "talker", talker)
            work.result()
        yield stack
    finally:
        down = stack.run_cli("down")
        assert down.returncode == 0, down.stderr
        shutil.rmtree(directory, ignore_errors=True)


def put_up(stack: Stack, name: str, path: Path, options: Path | None = None) -> None:
    imported = stack.run_cli("models", "import", path, "--name", name)
    assert imported.returncode == 0, imported.stderr
    deployed = stack.run_cli("deploy", name, *(["--config", options] if options else []))
    assert deployed.returncode == 0, deployed.stderr


class Clients:
    """Threads that ask one after the other until told to stop; each answer is noted."""

    def __init__(self, stack: Stack, num_clients: int = 6) -> None:
        self._stack = stack
        self._enough = threading.Event()
        self._pool = ThreadPoolExecutor(num_clients)
        self._num_clients = num_clients
        self.found: Counter[int | str] = Counter()
        self.seconds: list[float] = []

    def __enter__(self) -> Clients:
        self._running = [self._pool.submit(self._run) for _ in range(self._num_clients)]
        return self

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        for running in self._running:
            running.result()
        self._pool.shutdown()

    def go_on(self, num_answers: int = 60) -> None:
        """Return once so many more requests were answered."""
        enough = self.found[200] + num_answers
        deadline_s = time.monotonic() + 40
        while self.found[200] < enough:
            assert time.monotonic() < deadline_s, self.found
            time.sleep(0.01)

    @property
    def failures(self) -> dict[int | str, int]:
        return {outcome: count for outcome, count in self.found.items() if outcome != 200}

    def _run(self) -> None:
        url = f"{self._stack.settings.gateway_url}{INFER}"
        headers = {"authorization": f"Bearer {self._stack.key}"}
        with httpx.Client(headers=headers, timeout=40) as client:
            while not self._enough.is_set():
                begun_s = time.monotonic()
                try:
                    outcome: int | str = client.post(url, content=body_of(1)).status_code
                except httpx.HTTPError as error:
                    outcome = type(error).__name__
                self.found[outcome] += 1
                self.seconds.append(time.monotonic() - begun_s)


def test_several_answers_to_one_request_all_come(busy_stack: Stack) -> None:
    asked = {"model": "talker", "prompt": ["on", "off"], "n": 3, "max_tokens": 4}
    answer = httpx.post(
        f"{busy_stack.settings.gateway_url}/v1/completions",
        json=asked,
        headers={"authorization": f"Bearer {busy_stack.key}"},
        timeout=30,
    )
    assert len(answer.json()["choices"]) == 6


def test_a_killed_model_replica_costs_no_request(busy_stack: Stack) -> None:
    with Clients(busy_stack) as clients:
        clients.go_on()
        replicas(busy_stack, "work.v1", 2)[0].kill()
        clients.go_on(150)
    assert clients.failures == {}


def test_a_killed_gateway_costs_what_it_was_answering(busy_stack: Stack) -> None:
    with Clients(busy_stack, num_clients := 6) as clients:
        clients.go_on()
        replicas(busy_stack, "gateway", 2)[0].kill()
        clients.go_on(150)
    assert sum(clients.failures.values()) <= num_clients, clients.found


def test_answers_go_on_without_serves_controller_and_without_mlflow(busy_stack: Stack) -> None:
    replicas(busy_stack, "gateway", 2)
    with Clients(busy_stack) as clients:
        clients.go_on()
        (controller,) = processes(busy_stack, "ServeController")
        controller.kill()
        tracking = processes(busy_stack, "mlflow.*server|gunicorn|uvicorn")
        for process in tracking:
            process.suspend()
        clients.go_on(150)
    for process in tracking:
        process.resume()
    assert clients.failures == {}


def assert_idle_soon(replica_processes: list[psutil.Process]) -> None:
    """Long before the work would have been done, they compute no more."""
    deadline_s = time.monotonic() + 4
    used_s = 1.0
    while used_s > 0.05:
        assert time.monotonic() < deadline_s, f"still computing: {used_s:.2f} s in half a second"
        before = [cpu_seconds(process) for process in replica_processes]
        time.sleep(0.5)
        after = [cpu_seconds(process) for process in replica_processes]
        used_s = max(end - start for start, end in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("deployment", "number", "path", "body"),
    [
        ("work.v1", 2, INFER, body_of(2500)),
        ("work.v1", 2, INFER, body_of(6000)),
        ("talker.v1", 1, "/v1/completions", {"stream": True}),
        ("talker.v1", 1, "/v1/completions", {"stream": False}),
    ],
    ids=["graph", "graph, large body", "stream", "whole text"],
)
def test_a_client_that_leaves_frees_the_work(
    busy_stack: Stack, deployment: str, number: int, path: str, body: str | dict[str, bool]
) -> None:
    working = replicas(busy_stack, deployment, number)
    start = [cpu_seconds(process) for process in working]
    if isinstance(body, dict):
        asked = {"model": "talker", "prompt": "on", "max_tokens": 8000, "logit_bias": {"0": -100}}
        body = json.dumps(asked | body)
    with connect(busy_stack) as client:
        client.sendall(head_of(busy_stack, path, len(body)) + body.encode())
        deadline_s = time.monotonic() + 20
        while max(cpu_seconds(p) - begun for p, begun in zip(working, start, strict=True)) < 0.5:
            assert time.monotonic() < deadline_s, "the work was never begun"
            time.sleep(0.05)
    assert_idle_soon(working)


def test_slow_readers_and_writers_leave_the_others_alone(busy_stack: Stack) -> None:
    replicas(busy_stack, "gateway", 2)
    with Clients(busy_stack, 2) as alone:
        alone.go_on(200)
    with slow_clients(busy_stack) as go_on:
        time.sleep(3)
        with Clients(busy_stack, 2) as beside:
            for _ in range(4):
                go_on()
                beside.go_on(50)
        assert_more_connections_are_refused(busy_stack)
    assert alone.failures == beside.failures == {}
    p99_s = [float(np.percentile(clients.seconds, 99)) for clients in (alone, beside)]
    logger.warning(
        "p99 alone %.1f ms, beside %d slow clients %.1f ms: ratio %.2f",
        p99_s[0] * 1e3,
        NUM_SLOW,
        p99_s[1] * 1e3,
        p99_s[1] / p99_s[0],
    )
    with connect(busy_stack) as client:
        assert answers(client)  # there is room again


def answers(client: socket.socket) -> bool:
    try:
        client.sendall(b"GET /v2/health/live HTTP/1.1\r\nhost: gateway\r\n\r\n")
        return b"200 OK" in client.recv(1000)
    except ConnectionError:
        return False


def assert_more_connections_are_refused(stack: Stack) -> None:
    with contextlib.ExitStack() as more, contextlib.suppress(ConnectionError):
        clients = [more.enter_context(connect(stack)) for _ in range(60)]
        assert not all(answers(client) for client in clients)


def test_a_lost_node_costs_no_request_and_another_takes_its_place(
    busy_stack: Stack, tmp_path: Path
) -> None:
    """Two nodes, each with room for one of the two replicas."""
    releases = Releases(busy_stack, tmp_path)
    version = releases.publish()
    with WorkerNode(busy_stack, num_cpus=1) as node:
        releases.ask(version, "direct", num_replicas=2, num_cpus=1)
        assert releases.settled(version)["state"] == "champion"
        replicas(busy_stack, f"{NAME}.v{version}", 2)
        assert len(node.replicas(NAME)) == 1
        with LiveLoad(busy_stack.settings, NAME, ROWS, LABELS) as load:
            go_on(load)
            node.kill()
            go_on(load, 300)
            with WorkerNode(busy_stack, num_cpus=1) as another:
                replicas(busy_stack, f"{NAME}.v{version}", 2)
                assert len(another.replicas(NAME)) == 1
                go_on(load)
    assert load.seen.num_failed == 0, load.seen.failures


def test_a_cluster_that_goes_down_answers_what_it_was_asked(busy_stack: Stack) -> None:
    url = f"{busy_stack.settings.gateway_url}{INFER}"
    with ThreadPoolExecutor(2) as pool:
        working = replicas(busy_stack, "work.v1", 2)
        start = [cpu_seconds(process) for process in working]
        answer = pool.submit(
            httpx.post,
            url,
            content=body_of(600),
            headers={"authorization": f"Bearer {busy_stack.key}"},
            timeout=60,
        )
        while max(cpu_seconds(p) - begun for p, begun in zip(working, start, strict=True)) < 0.3:
            time.sleep(0.02)
        down = pool.submit(busy_stack.run_cli, "down")
        assert answer.result().status_code == 200
        assert down.result().returncode == 0, down.result().stderr
