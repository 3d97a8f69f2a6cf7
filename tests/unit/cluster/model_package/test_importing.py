"""Models as other tools leave them are cleaned up, or refused with the way to convert them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cluster.errors import ForbiddenFileError, HeliostatError, InputError, PackageError
from cluster.model_package import Golden, Manifest, ModelPackage
from cluster.model_package.importing import prepare_import
from cluster.runtimes.onnx import OnnxRuntime
from tests.tiny_models import save_adapter


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    directory = tmp_path / "stage"
    directory.mkdir()
    return directory


def names(stage: Path) -> set[str]:
    return {path.name for path in stage.iterdir()}


def test_a_hugging_face_directory_is_reduced_to_what_is_allowed(
    llama_dir: Path, stage: Path
) -> None:
    wanted = names(llama_dir)
    for extra in ("training_args.bin", ".gitattributes", "picture.png", "consolidated.safetensors"):
        (llama_dir / extra).write_bytes(b"x")
    (llama_dir / ".git").mkdir()
    prepared = prepare_import(llama_dir, stage)
    assert prepared.kind == "language_model"
    assert names(stage) == wanted
    assert prepared.notes == (
        "left out: .git/, .gitattributes, consolidated.safetensors, picture.png, training_args.bin",
    )


def test_links_of_a_hugging_face_cache_are_followed(
    llama_dir: Path, stage: Path, tmp_path: Path
) -> None:
    snapshot = tmp_path / "models--me--tiny" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    blobs = llama_dir.rename(tmp_path / "models--me--tiny" / "blobs")
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    prepare_import(snapshot, stage)
    assert names(stage) == names(blobs)
    assert not any(path.is_symlink() for path in stage.iterdir())


def test_a_link_out_of_the_directory_is_refused(
    llama_dir: Path, stage: Path, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("mine", encoding="utf-8")
    (llama_dir / "vocab.json").unlink(missing_ok=True)
    (llama_dir / "vocab.json").symlink_to(secret)
    with pytest.raises(ForbiddenFileError, match="link to"):
        prepare_import(llama_dir, stage)
    assert not (stage / "vocab.json").exists()


def test_a_pipe_is_refused_and_not_waited_for(stage: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.onnx")
    with pytest.raises(InputError, match="no plain file"):
        prepare_import(tmp_path / "pipe.onnx", stage)


def test_pickled_weights_are_refused_with_the_fix(llama_dir: Path, stage: Path) -> None:
    (llama_dir / "model.safetensors").rename(llama_dir / "pytorch_model.bin")
    with pytest.raises(ForbiddenFileError, match=r"pytorch_model\.bin.*safe_serialization"):
        prepare_import(llama_dir, stage)


def test_pickles_beside_safetensors_are_left_out(llama_dir: Path, stage: Path) -> None:
    (llama_dir / "pytorch_model.bin").write_bytes(b"x")
    assert "pytorch_model.bin" in prepare_import(llama_dir, stage).notes[0]


def a_package(directory: Path) -> ModelPackage:
    """What importing asks of a base: where its files are."""
    shutil.copytree(directory, directory.parent / "package/model")
    manifest = Manifest(
        kind="language_model",
        name="base",
        created_at="",
        files={},
        golden=Golden(inputs={}, outputs={}, tolerance=0),
    )
    return ModelPackage(directory.parent / "package", manifest, "sha256:" + "0" * 64, None)


def test_an_adapter_without_its_base_is_refused_with_the_fix(llama_dir: Path, stage: Path) -> None:
    (llama_dir / "adapter_config.json").write_text("{}")
    with pytest.raises(PackageError, match=r"--base NAME; or merge it .*merge_and_unload"):
        prepare_import(llama_dir, stage)


def test_an_adapter_takes_its_bases_tokenizer_if_it_has_none(
    llama_dir: Path, stage: Path, tmp_path: Path
) -> None:
    adapter = save_adapter(tmp_path / "adapter", llama_dir)
    for path in adapter.glob("tokenizer*"):
        path.unlink()
    (adapter / "optimizer.pt").write_bytes(b"x")
    prepared = prepare_import(adapter, stage, a_package(llama_dir))
    assert prepared.kind == "adapter"
    assert prepared.notes == ("left out: optimizer.pt", "it has no tokenizer: its base's is taken")
    assert names(stage) >= {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}
    assert "model.safetensors" not in names(stage)


def test_an_adapters_pickle_is_refused(llama_dir: Path, stage: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", llama_dir)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ForbiddenFileError, match=r"adapter_model\.bin.*safe_serialization"):
        prepare_import(adapter, stage, a_package(llama_dir))


def test_only_adapters_have_a_base(llama_dir: Path, stage: Path) -> None:
    with pytest.raises(InputError, match="no adapter"):
        prepare_import(llama_dir, stage, a_package(llama_dir))


def test_weights_bring_the_configuration_beside_them(llama_dir: Path, stage: Path) -> None:
    wanted = names(llama_dir)
    assert prepare_import(llama_dir / "model.safetensors", stage).kind == "language_model"
    assert names(stage) == wanted


def test_weights_of_another_name_become_the_models(llama_dir: Path, stage: Path) -> None:
    wanted = names(llama_dir)
    shutil.copyfile(llama_dir / "model.safetensors", llama_dir / "better.safetensors")
    (llama_dir / "model.safetensors").write_bytes(b"worse")
    prepared = prepare_import(llama_dir / "better.safetensors", stage)
    assert names(stage) == wanted
    assert (stage / "model.safetensors").read_bytes() != b"worse"
    assert prepared.notes == ("left out: model.safetensors",)


def test_weights_alone_are_no_model(llama_dir: Path, stage: Path) -> None:
    (llama_dir / "config.json").unlink()
    with pytest.raises(PackageError, match=r"no config\.json beside it"):
        prepare_import(llama_dir / "model.safetensors", stage)


@pytest.mark.parametrize("name", ["model.pkl", "model.pt", "model.joblib", "model.bin"])
def test_pickle_files_are_refused_with_the_fix(tmp_path: Path, stage: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ForbiddenFileError, match="ONNX"):
        prepare_import(tmp_path / name, stage)


def test_what_is_no_model_is_named(tmp_path: Path, stage: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        prepare_import(tmp_path / "none", stage)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match="no model that can be imported"):
        prepare_import(tmp_path / "notes.txt", stage)
    (tmp_path / "bad.onnx").write_bytes(b"not a graph")
    with pytest.raises(PackageError, match=r"bad\.onnx"):
        prepare_import(tmp_path / "bad.onnx", stage)


def graph_with_external_data(directory: Path, location: str) -> Path:
    weights = np.arange(4096, dtype=np.float32).reshape(2, 2048)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "W"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 2048])],
        [numpy_helper.from_array(weights, "W")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = directory / "big.onnx"
    onnx.save_model(model, path, save_as_external_data=True, location=location)
    return path


@pytest.mark.parametrize("inline", [True, False])
def test_external_data_comes_along(
    tmp_path: Path, stage: Path, inline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not inline:
        monkeypatch.setattr("cluster.model_package.importing._MAX_INLINE_BYTES", 10)
    path = graph_with_external_data(tmp_path, "weights.bin")
    prepared = prepare_import(path, stage)
    assert names(stage) == ({"model.onnx"} if inline else {"model.onnx", "model.onnx.data"})
    assert "weights.bin" in prepared.notes[0]
    y = OnnxRuntime(stage / "model.onnx").run({"x": np.array([[1, 0]], np.float32)})["y"]
    np.testing.assert_array_equal(y[0], np.arange(2048))


def test_missing_external_data_is_named(tmp_path: Path, stage: Path) -> None:
    path = graph_with_external_data(tmp_path, "weights.bin")
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(PackageError, match=r"weights\.bin"):
        prepare_import(path, stage)


@pytest.mark.parametrize("location", ["../secret", "/etc/hostname"])
def test_external_data_elsewhere_is_refused(tmp_path: Path, stage: Path, location: str) -> None:
    path = graph_with_external_data(tmp_path, "weights.bin")
    model = onnx.load(path, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = location
    path.write_bytes(model.SerializeToString())
    with pytest.raises(HeliostatError, match="outside its own directory"):
        prepare_import(path, stage)
    assert names(stage) == set()


def test_external_data_that_cannot_be_read_is_one_line(tmp_path: Path, stage: Path) -> None:
    path = graph_with_external_data(tmp_path, "weights.bin")
    (tmp_path / "weights.bin").rename(tmp_path / "elsewhere")
    (tmp_path / "weights.bin").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PackageError, match="cannot be read") as caught:
        prepare_import(path, stage)
    assert "\n" not in str(caught.value)
