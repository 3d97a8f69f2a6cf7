"""One model on the real stack and versions of it to release: good ones, and some that are not.

releases = Releases(stack, directory)
releases.begin()
releases.release(releases.publish(0.001), "canary")["state"]      # champion
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import psutil
from onnx import TensorProto, helper, numpy_helper

from cluster.admin_client import AdminClient
from cluster.cli.import_model import import_path
from cluster.cli.live_load import LiveLoad, Seen
from cluster.database import open_database
from cluster.model_package import package_key
from cluster.model_ref import ModelRef
from cluster.registry import ModelRegistry
from cluster.releases import Deployment, ReleaseStore, State
from cluster.runtimes.onnx import OnnxRuntime
from cluster.session.processes import find
from cluster.storage import Storage
from tests.stack import Stack

NAME = "steady"
ENDS: tuple[State, ...] = ("champion", "failed", "rolled_back")
WIDTH, NUM_CLASSES, NUM_KNOWN = 8, 3, 10
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


def assert_unharmed(seen: Seen) -> None:
    """Every customer had an answer, and the right one."""
    assert seen.num_failed == 0, seen.failures
    assert not +seen.wrong_by_version


def go_on(load: LiveLoad, num_answers: int = 100, timeout_s: float = 60) -> None:
    """Return once customers had so many more answers."""
    enough = load.seen.by_version.total() + num_answers
    deadline_s = time.monotonic() + timeout_s
    while load.seen.by_version.total() < enough:
        assert time.monotonic() < deadline_s, load.seen.failures
        time.sleep(0.05)


class Releases:
    """One served model, and versions to release."""

    def __init__(self, stack: Stack, directory: Path) -> None:
        self.stack, self.directory = stack, directory
        self.admin = AdminClient.open(stack.settings)
        self.registry = ModelRegistry.open(stack.settings)
        self.store = ReleaseStore(open_database(stack.settings.database))

    def begin(self) -> None:
        """Serve a first version."""
        self.release(self.publish(), "direct")

    def publish(
        self, shift: float = 0.0, *, fails: bool = False, has_other_golden: bool = False
    ) -> int:
        """A version whose scores are shifted a little; returns its number.

        Args:
            fails: half of the requests.
            has_other_golden: golden outputs that are another graph's, under a good signature.
        """
        path = save_classes(self.directory / "m.onnx", WEIGHTS + np.float32(shift), fails=fails)
        replayed = (
            save_classes(self.directory / "other.onnx", -WEIGHTS) if has_other_golden else path
        )
        with mock.patch("cluster.runtimes.onnx.OnnxRuntime", return_value=OnnxRuntime(replayed)):
            return import_path(path, NAME, self.stack.settings, say=lambda _: None).version

    def release(self, version: int, strategy: str) -> dict[str, Any]:
        """Ask for it and wait until it is settled."""
        self.ask(version, strategy)
        return self.settled(version)

    def ask(self, version: int, strategy: str, **options: Any) -> None:
        """Begin a release; `options` are others of the deployment."""
        self.admin.deploy(f"{NAME}/{version}", strategy, {**OPTIONS, **options})

    def settled(self, version: int) -> dict[str, Any]:
        """Wait for the end of a release."""
        deadline_s = time.monotonic() + 120
        while True:
            row = self.admin.deployment(NAME, version)
            if row["state"] in ENDS:
                return row
            assert time.monotonic() < deadline_s, row
            time.sleep(0.1)

    def reached(self, version: int, *states: State) -> Deployment:
        """Wait until it is in one of these, as the tables say: no controller has to be up."""
        deadline_s = time.monotonic() + 120
        while True:
            row = self.store.get(NAME, version)
            if row is not None and row.state in states:
                return row
            assert row is None or row.state not in ENDS, row
            assert time.monotonic() < deadline_s, row
            time.sleep(0.05)

    def kill(self, version: int) -> int:
        """End the version's replicas as a crash does; returns how many there were."""
        num_killed = 0
        for process in find(self.stack.settings.home):
            with contextlib.suppress(psutil.Error):
                if f"ServeReplica:{NAME}.v{version}:" in " ".join(process.cmdline()):
                    process.kill()
                    num_killed += 1
        return num_killed

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
