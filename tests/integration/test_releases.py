"""Releases on the real stack, under constant load: customers see none of what goes wrong.

The demo, `heliostat demo --release`, shows a promotion and a rollback for wrong answers; here are
versions that cannot be loaded or fail while they are compared, and a rollback by hand.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cluster.admin_client import AdminClient
from cluster.cli.live_load import LiveLoad
from cluster.model_package import package_key
from cluster.model_ref import ModelRef
from cluster.registry import ModelRegistry
from cluster.storage import Storage
from tests.stack import Stack

pytestmark = [pytest.mark.stack, pytest.mark.timeout(300)]

NAME = "steady"
WIDTH, NUM_CLASSES, NUM_KNOWN = 8, 3, 10
ROLLBACK_S = 1.0
OPTIONS: dict[str, Any] = {
    "release": {
        "margins": {"errors": 0.05, "slow": 0.5},
        "steps": [0.5],
        "mirror_share": 1.0,
        "min_observations": 50,
        "max_duration_s": 10,
    }
}
WEIGHTS = np.random.default_rng(0).normal(size=(WIDTH, NUM_CLASSES)).astype(np.float32)
ROWS = np.random.default_rng(1).random((200, WIDTH), dtype=np.float32) * 2 * NUM_KNOWN
LABELS = [str(label) for label in (ROWS @ WEIGHTS).argmax(axis=1)]


def save_classes(path: Path, weights: Any, *, fails: bool = False) -> Path:
    """Classes of linear scores; where it `fails`, half of the rows have no place in a table."""
    nodes = [helper.make_node("MatMul", ["pixels", "W"], ["scores"])]
    constants = [numpy_helper.from_array(weights, "W")]
    if fails:
        nodes += [
            helper.make_node("Gather", ["pixels", "first"], ["value"], axis=1),
            helper.make_node("Cast", ["value"], ["place"], to=TensorProto.INT64),
            helper.make_node("Gather", ["table", "place"], ["one"]),
            helper.make_node("Mul", ["scores", "one"], ["known"]),
        ]
        constants += [
            numpy_helper.from_array(np.array([0], np.int64), "first"),
            numpy_helper.from_array(np.ones(NUM_KNOWN, np.float32), "table"),
        ]
    nodes += [
        helper.make_node("Softmax", ["known" if fails else "scores"], ["probabilities"], axis=1),
        helper.make_node("ArgMax", ["probabilities"], ["label"], axis=1, keepdims=0),
    ]
    outputs = [
        helper.make_tensor_value_info("label", TensorProto.INT64, ["batch"]),
        helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", NUM_CLASSES]),
    ]
    inputs = [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", WIDTH])]
    graph = helper.make_graph(nodes, "classes", inputs, outputs, constants)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path
    )
    return path


class Releases:
    """One served model, and versions to release."""

    def __init__(self, stack: Stack, directory: Path) -> None:
        self.stack, self.directory = stack, directory
        self.admin = AdminClient.open(stack.settings)
        self.registry = ModelRegistry.open(stack.settings)

    def publish(self, shift: float = 0.0, *, fails: bool = False) -> int:
        """A version whose scores are shifted a little; returns its number."""
        path = save_classes(self.directory / "m.onnx", WEIGHTS + np.float32(shift), fails=fails)
        imported = self.stack.run_cli("models", "import", path, "--name", NAME)
        assert imported.returncode == 0, imported.stderr
        return self.registry.list_versions(NAME)[-1].version

    def release(self, version: int, strategy: str) -> dict[str, Any]:
        """Ask for it and wait until it is settled."""
        asked = self.admin.deploy(f"{NAME}/{version}", strategy, OPTIONS)
        deadline_s = time.monotonic() + 90
        while True:
            row = self.admin.deployment(NAME, version)
            if row["release_id"] == asked["release_id"] and row["state"] in (
                "champion", "failed", "rolled_back",
            ):  # fmt: skip
                return row
            assert time.monotonic() < deadline_s, row
            time.sleep(0.1)

    def tamper(self, version: int) -> None:
        """Change a stored package after it was signed."""
        found = self.registry.resolve(ModelRef(NAME, version=version))
        storage = Storage.open(self.stack.settings.storage_root)
        key = f"{package_key(found.digest)}/model/model.onnx"
        content = bytearray(storage.read_bytes(key))
        content[-1] ^= 1
        path = storage.local_path(key)
        assert path is not None
        path.chmod(0o600)
        path.write_bytes(content)


@pytest.fixture(scope="module")
def releases(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Releases]:
    found = Releases(stack, tmp_path_factory.mktemp("versions"))
    found.admin.deploy(f"{NAME}/{found.publish()}", "direct", OPTIONS)
    found.release(1, "direct")
    yield found
    found.admin.undeploy(NAME, None)


def test_customers_see_no_failure_whatever_is_released(releases: Releases) -> None:
    good, unloadable, failing = (
        releases.publish(0.001), releases.publish(0.002), releases.publish(0.003, fails=True),
    )  # fmt: skip
    releases.tamper(unloadable)
    with LiveLoad(releases.stack.settings, NAME, ROWS, LABELS) as load:
        row = releases.release(good, "canary")
        assert row["state"] == "champion", row["reason"]
        assert load.seen.by_version.keys() >= {f"{NAME}/1", f"{NAME}/{good}"}

        row = releases.release(unloadable, "shadow")
        assert row["state"] == "failed"
        assert "changed" in row["reason"]

        row = releases.release(failing, "canary")
        assert row["state"] == "rolled_back", row["reason"]
        assert "errors" in row["reason"]

        before = load.seen
        back = releases.admin.rollback(NAME)
        assert back["version"] == 1
        time.sleep(ROLLBACK_S)
        settled = load.seen.by_version[f"{NAME}/{good}"]
        while load.seen.num_requests < before.num_requests + 120:
            time.sleep(0.05)
        assert load.seen.by_version[f"{NAME}/{good}"] <= settled + 4, "those under way"
    seen = load.seen
    assert seen.num_failed == 0, seen.failures
    assert not +seen.wrong_by_version, "a customer had a wrong answer"
    assert seen.by_version[f"{NAME}/{unloadable}"] == 0


def test_the_demo_promotes_the_good_version_and_rolls_the_bad_one_back(stack: Stack) -> None:
    demo = stack.run_cli("demo", "--release", "--fast", timeout_s=280)
    assert demo.returncode == 0, f"{demo.stdout[-3000:]}\n{demo.stderr[-3000:]}"
    assert re.search(r"s  shadow .*\n(.*\n)*.*s  champion ", demo.stdout)
    assert re.search(r"s  rolled_back  .*(disagreement|distance)", demo.stdout)
    assert re.search(r"\d requests, 0 failed; p50 \d+ ms", demo.stdout)
