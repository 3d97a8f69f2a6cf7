"""Registered versions in other forms: the same answers with their certificate, or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from transformers import AutoModelForCausalLM

from cluster.errors import InputError, NotRunningError, PackageError, ParityError
from cluster.model_package import (
    LocalSigner,
    ModelPackage,
    ensure_local_key,
    golden,
    open_version,
    write_package,
)
from cluster.model_ref import ModelRef
from cluster.processing import Labels, Processing, Scale, TensorSpec, is_batchable
from cluster.registry import ModelRegistry, ModelVersion
from cluster.runtimes.onnx import OnnxRuntime
from cluster.settings import Settings
from cluster.storage import Storage
from jobs.export import check, export
from jobs.exporting.config import ExportConfig
from jobs.exporting.graph import opset_of


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """A home of its own; MLflow, which numbers versions, is not needed."""
    monkeypatch.setattr("cluster.registry.open_client", lambda settings: None)
    monkeypatch.setattr("cluster.publishing.require_server", lambda settings: None)
    monkeypatch.setattr(
        "cluster.registry.number_version",
        lambda *_, taken, **others: max(taken, default=0) + 1,
    )
    settings = Settings(home=tmp_path / "home")
    ensure_local_key(settings.keys_dir)
    return settings


def register(settings: Settings, name: str, directory: Path, **options: Any) -> ModelVersion:
    published = write_package(
        directory,
        name=name,
        storage=Storage.open(settings.storage_root),
        signer=LocalSigner(settings.keys_dir),
        metrics={"accuracy": 0.5},
        **options,
    )
    return ModelRegistry.open(settings).register(name, published)


def exported(settings: Settings, **values: Any) -> tuple[ModelVersion, ModelPackage]:
    config = ExportConfig(name="out", to="onnx", **values)
    export(config, settings)
    version = ModelRegistry.open(settings).resolve(ModelRef("out", alias="candidate"))
    return version, open_version(version, settings)


def classifier(directory: Path, batch: int | str, *, built_in: bool = False) -> Path:
    """Scores of three classes; `built_in` writes the batch into the middle of the graph."""
    weights = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    scores = helper.make_node("MatMul", ["x", "W"], ["scores"])
    nodes = [scores, helper.make_node("Reshape", ["scores", "shape"], ["logits"])]
    shape = np.array([batch if built_in else -1, 3], np.int64)
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 2])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 3])],
        [onnx.numpy_helper.from_array(weights, "W"), onnx.numpy_helper.from_array(shape, "shape")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    directory.mkdir()
    onnx.save(model, directory / "model.onnx")
    return directory


def register_classifier(settings: Settings, directory: Path) -> ModelVersion:
    batch = onnx.load(directory / "model.onnx").graph.input[0].type.tensor_type.shape.dim[0]
    return register(
        settings,
        "scores",
        directory,
        kind="graph",
        processing=Processing(
            inputs=(TensorSpec(name="x", datatype="FP32", shape=(batch.dim_value or -1, 2)),),
            pre=(Scale(tensor="x", factor=3.0),),
            post=(Labels(tensor="logits", labels=("a", "b", "c")),),
        ),
    )


def test_a_language_model_becomes_a_graph_of_any_batch_and_length(
    settings: Settings, language_model_dir: Path
) -> None:
    parent = register(settings, "text", language_model_dir, kind="language_model")
    check(ExportConfig(model="text/1", name="out", to="onnx"), settings)
    version, package = exported(settings, model="text/1")
    assert (version.kind, version.parent_digest) == ("graph", parent.digest)
    golden.replay(package)
    parity = package.manifest.parity
    assert 0 < parity["largest_difference"] <= parity["tolerance"]  # type: ignore[operator]
    assert package.manifest.metrics == {"accuracy": 0.5}
    assert [str(spec) for spec in package.manifest.inputs] == ["input_ids: INT64 [any, any]"]
    runtime = OnnxRuntime(package.graph_path)
    model = AutoModelForCausalLM.from_pretrained(language_model_dir, dtype="float32").eval()
    for shape in ((1, 1), (3, 17), (2, 100)):
        ids = np.random.default_rng(1).integers(0, 257, shape)
        with torch.inference_mode():
            expected = model(torch.tensor(ids)).logits.numpy()
        np.testing.assert_allclose(runtime.run({"input_ids": ids})["logits"], expected, atol=1e-4)


def test_more_than_the_tolerance_is_not_registered(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_classifier(settings, classifier(tmp_path / "graph", "batch"))

    def spoiled(model: Any, opset: int) -> Any:
        weights = onnx.numpy_helper.to_array(model.graph.initializer[0]) * 1.01
        model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weights, "W"))
        return model

    monkeypatch.setattr("onnx.version_converter.convert_version", spoiled)
    with pytest.raises(ParityError, match=r"'logits' differs by .*, expected at most"):
        exported(settings, model="scores/1", opset=20)
    assert [v.name for v in ModelRegistry.open(settings).list_versions()] == ["scores"]
    assert len(list((settings.home / "storage/packages").iterdir())) == 1
    exported(settings, model="scores/1", opset=20, relative_tolerance=0.1)


def test_a_graph_is_written_at_another_opset(settings: Settings, tmp_path: Path) -> None:
    parent = register_classifier(settings, classifier(tmp_path / "graph", "batch"))
    version, package = exported(settings, model="scores/1", opset=20)
    assert version.parent_digest == parent.digest
    assert opset_of(onnx.load(package.graph_path)) == 20
    before = open_version(parent, settings).manifest
    assert package.manifest.golden.inputs == before.golden.inputs
    assert package.manifest.processing == before.processing
    assert package.manifest.parity["largest_difference"] == 0
    golden.replay(package)
    with pytest.raises(InputError, match="has opset 17 and a free batch already"):
        exported(settings, model="scores/1")


def test_a_fixed_batch_becomes_free(settings: Settings, tmp_path: Path) -> None:
    parent = register_classifier(settings, classifier(tmp_path / "graph", 2))
    assert not is_batchable(open_version(parent, settings).manifest)
    _, package = exported(settings, model="scores/1")
    assert is_batchable(package.manifest)
    golden.replay(package)
    rows = np.ones((5, 2), np.float32)
    assert OnnxRuntime(package.graph_path).run({"x": rows})["logits"].shape == (5, 3)


def test_a_batch_that_is_built_in_is_refused(settings: Settings, tmp_path: Path) -> None:
    register_classifier(settings, classifier(tmp_path / "graph", 2, built_in=True))
    with pytest.raises(PackageError, match="batch of 2 cannot be freed") as caught:
        exported(settings, model="scores/1")
    assert "\n" not in str(caught.value)


def test_a_version_of_the_wrong_kind_is_named(settings: Settings, tmp_path: Path) -> None:
    register_classifier(settings, classifier(tmp_path / "graph", "batch"))
    config = ExportConfig(model="scores/1", name="out", to="merged")
    with pytest.raises(InputError, match="kind 'graph'; to=merged expects adapter"):
        check(config, settings)


def test_what_could_not_be_signed_is_not_derived(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_classifier(settings, classifier(tmp_path / "graph", "batch"))
    (settings.keys_dir / "signing_key.pem").unlink()
    monkeypatch.setattr("jobs.export.derive", lambda *_: pytest.fail("it began"))
    with pytest.raises(NotRunningError, match="there is no signing key"):
        exported(settings, model="scores/1", opset=20)
