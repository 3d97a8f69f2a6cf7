"""A home with registered models, small and real: two graphs, and a chat model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from cluster.model_package import ensure_local_key, open_signer, write_package
from cluster.processing import Labels, Processing, Softmax
from cluster.registry import ModelRegistry
from cluster.settings import Settings
from cluster.storage import Storage
from tests.tiny_models import CHAT_TEMPLATE, save_llama


def register_models(home: Path) -> Settings:
    """`colours/1`, x [any, 2] → the likeliest of red, green, blue; `vectors/1`, token ids →
    their sum and number; `talker/1`, a tiny Llama that chats."""
    settings = Settings(home=home, mlflow_tracking_uri=f"sqlite:///{home / 'mlflow.db'}")
    ensure_local_key(settings.keys_dir)
    models = home / "models"
    processing = Processing(
        post=(
            Softmax(tensor="logits", into="probabilities"),
            Labels(tensor="logits", labels=("red", "green", "blue")),
        )
    )
    _register(settings, "colours", _save_graph(models / "graph"), "graph", processing=processing)
    _register(settings, "vectors", _save_embedder(models / "embedder"), "graph")
    directory = save_llama(models / "llama", "Once upon a time", num_hidden_layers=1)
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    _register(settings, "talker", directory, "language_model")
    return settings


def _register(settings: Settings, name: str, directory: Path, kind: Any, **values: Any) -> None:
    published = write_package(
        directory,
        name=name,
        kind=kind,
        storage=Storage.open(settings.storage_root),
        signer=open_signer(settings),
        keyset=None,
        **values,
    )
    ModelRegistry.open(settings).register(name, published)


def _save_graph(directory: Path) -> Path:
    directory.mkdir(parents=True)
    weights = numpy_helper.from_array(np.array([[1, 0, -1], [0, 1, -1]], np.float32), "W")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "W"], ["logits"])],
        "colours",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
        [weights],
    )
    return _save(graph, directory)


def _save_embedder(directory: Path) -> Path:
    directory.mkdir(parents=True)
    axes = numpy_helper.from_array(np.array([1], np.int64), "axes")
    zero = numpy_helper.from_array(np.array(0, np.float32), "zero")
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["input_ids"], ["floats"], to=TensorProto.FLOAT),
            helper.make_node("ReduceSum", ["floats", "axes"], ["sums"]),
            helper.make_node("Pow", ["floats", "zero"], ["ones"]),
            helper.make_node("ReduceSum", ["ones", "axes"], ["counts"]),
            helper.make_node("Concat", ["sums", "counts"], ["embedding"], axis=1),
        ],
        "embedder",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "tokens"])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", 2])],
        [axes, zero],
    )
    return _save(graph, directory)


def _save(graph: onnx.GraphProto, directory: Path) -> Path:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, directory / "model.onnx")
    return directory
