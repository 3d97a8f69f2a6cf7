"""Replicas follow the load, to zero and back, and nobody who asks notices."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cluster.session.ray_head import auth_header
from tests.stack import Stack

pytestmark = [pytest.mark.stack, pytest.mark.timeout(180)]

NUM_CLIENTS = 6
WIDTH = 1024
NUM_LAYERS = 1000
FAST = """
autoscaling:
  min_replicas: {min_replicas}
  max_replicas: 2
  target_ongoing_requests: 1.5
  upscale_delay_s: 0.2
  downscale_delay_s: 1
  look_back_s: 1
max_batch_size: 8
"""


def save_slow_graph(path: Path) -> None:
    """The mean of what goes in, after so much work that clients wait for the replica alone."""
    mean = numpy_helper.from_array(np.full((WIDTH, WIDTH), 1 / WIDTH, np.float32), "W")
    nodes = [helper.make_node("Tile", ["x", "repeats"], ["h0"])]
    nodes += [helper.make_node("MatMul", [f"h{i}", "W"], [f"h{i + 1}"]) for i in range(NUM_LAYERS)]
    nodes.append(helper.make_node("ReduceMean", [f"h{NUM_LAYERS}"], ["y"], axes=[1], keepdims=1))
    graph = helper.make_graph(
        nodes,
        "slow",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 1])],
        [mean, numpy_helper.from_array(np.array([1, WIDTH], np.int64), "repeats")],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path
    )


@pytest.fixture(scope="module")
def slow_model(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("slow") / "slow.onnx"
    save_slow_graph(path)
    done = stack.run_cli("models", "import", path, "--name", "slow")
    assert done.returncode == 0, done.stderr
    return "slow"


@pytest.fixture
def deployed(
    stack: Stack, slow_model: str, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[str]:
    """The model with the `min_replicas` that a test asks for."""
    config = tmp_path / "options.yaml"
    config.write_text(FAST.format(min_replicas=request.param))
    done = stack.run_cli("deploy", slow_model, "--config", config)
    assert done.returncode == 0, done.stderr
    assert "on cpu" in done.stdout + stack.run_cli("releases", "list", "--json").stdout
    yield slow_model
    assert stack.run_cli("undeploy", slow_model).returncode == 0


def num_replicas(stack: Stack, name: str) -> int:
    """Running replicas, as Ray's own dashboard tells them."""
    url = f"{stack.settings.dashboard_url}/api/serve/applications/"
    applications = httpx.get(url, headers=auth_header(stack.settings)).json()["applications"]
    (deployment,) = applications[f"{name}.v1"]["deployments"].values()
    return Counter(replica["state"] for replica in deployment["replicas"])["RUNNING"]


def wait_for_replicas(stack: Stack, name: str, wanted: int) -> None:
    deadline_s = time.monotonic() + 30
    while (found := num_replicas(stack, name)) != wanted:
        assert time.monotonic() < deadline_s, f"{found} replicas, not {wanted}"
        time.sleep(0.2)


class Load:
    """Clients that ask one after the other until told to stop; every answer is checked."""

    def __init__(self, stack: Stack, name: str) -> None:
        self._client = httpx.Client(
            base_url=stack.settings.gateway_url,
            headers={"Authorization": f"Bearer {stack.key}"},
            timeout=60,
        )
        self._path = f"/v2/models/{name}/infer"
        self._enough = threading.Event()
        self.num_answers = 0

    def ask(self, value: float) -> None:
        tensor = {"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [value]}
        answer = self._client.post(self._path, json={"inputs": [tensor]})
        assert answer.status_code == 200, answer.text
        assert answer.json()["outputs"][0]["data"] == pytest.approx([value], rel=1e-3)
        self.num_answers += 1

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        self._client.close()

    def run(self, number: int) -> None:
        while not self._enough.is_set():
            self.ask(number + 1)

    def stop(self) -> None:
        self._enough.set()


@pytest.mark.parametrize("deployed", [1], indirect=True)
def test_a_load_step_takes_one_replica_to_two_and_back(stack: Stack, deployed: str) -> None:
    assert num_replicas(stack, deployed) == 1
    with Load(stack, deployed) as load, ThreadPoolExecutor(NUM_CLIENTS) as pool:
        clients = [pool.submit(load.run, number) for number in range(NUM_CLIENTS)]
        try:
            wait_for_replicas(stack, deployed, 2)
        finally:
            load.stop()
            for client in clients:
                client.result()
    assert load.num_answers > NUM_CLIENTS
    # One who goes on asking loses nothing while a replica ends.
    with Load(stack, deployed) as gentle, ThreadPoolExecutor(1) as pool:
        client = pool.submit(gentle.run, 0)
        try:
            wait_for_replicas(stack, deployed, 1)
        finally:
            gentle.stop()
            client.result()


@pytest.mark.parametrize("deployed", [0], indirect=True)
def test_a_model_at_rest_has_no_replica_until_it_is_asked(stack: Stack, deployed: str) -> None:
    wait_for_replicas(stack, deployed, 0)
    with Load(stack, deployed) as load:
        load.ask(3)
    assert num_replicas(stack, deployed) >= 1
    wait_for_replicas(stack, deployed, 0)
    state = json.loads(stack.run_cli("releases", "list", "--json").stdout)
    assert [row["state"] for row in state if row["name"] == deployed] == ["champion"]


def test_a_gpu_that_no_node_has_is_refused_at_once(stack: Stack, slow_model: str) -> None:
    config = stack.settings.home.parent / "gpu.yaml"
    config.write_text("num_gpus: 64\n")
    refused = stack.run_cli("deploy", slow_model, "--config", config)
    assert refused.returncode == 1
    assert "asks for 64 GPU, and no node of this cluster has more than" in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert slow_model not in stack.run_cli("releases", "list").stdout
