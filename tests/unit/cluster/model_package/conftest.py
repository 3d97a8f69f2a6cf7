"""Tiny real models, keys and storage for the package tests."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cluster.model_package import (
    LocalSigner,
    PublishedPackage,
    TrustStore,
    ensure_local_key,
    write_package,
)
from cluster.processing import Labels, Processing, Scale
from cluster.storage import Storage


@pytest.fixture
def keys_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "keys"
    ensure_local_key(directory)
    return directory


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage.open(str(tmp_path / "storage"))


@pytest.fixture
def trust(keys_dir: Path) -> TrustStore:
    return TrustStore(keys_dir)


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def graph_dir(tmp_path: Path) -> Path:
    """A linear classifier: logits = x @ W, [any, 2] to [any, 3]."""
    directory = tmp_path / "graph"
    directory.mkdir()
    weights = numpy_helper.from_array(np.array([[1, 0, 0], [0, 1, 0]], np.float32), "W")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "W"], ["logits"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
        [weights],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, directory / "model.onnx")
    (directory / "README.md").write_text("# Linear\n")
    return directory


@pytest.fixture
def publish(graph_dir: Path, storage: Storage, keys_dir: Path) -> Callable[[], PublishedPackage]:
    def write() -> PublishedPackage:
        return write_package(
            graph_dir,
            name="linear",
            kind="graph",
            storage=storage,
            signer=LocalSigner(keys_dir),
            processing=Processing(
                pre=(Scale(tensor="x", factor=2.0),),
                post=(Labels(tensor="logits", labels=("a", "b", "c")),),
            ),
            metrics={"accuracy": 0.5, "loss": float("nan")},
        )

    return write


@pytest.fixture
def published(publish: Callable[[], PublishedPackage]) -> PublishedPackage:
    return publish()


@pytest.fixture
def package_dir(published: PublishedPackage) -> Path:
    """The published package, as an attacker with access to storage finds it."""
    return Path(published.location)


@pytest.fixture
def llama_dir(language_model_dir: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(language_model_dir, tmp_path / "llama"))
