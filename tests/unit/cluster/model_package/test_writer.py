"""A package is written whole and right, or nothing is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from cluster.errors import (
    ForbiddenFileError,
    InputError,
    InvalidReferenceError,
    MachineError,
    MissingFileError,
    PackageError,
    ParityError,
)
from cluster.model_package import (
    Lineage,
    LocalSigner,
    PublishedPackage,
    TrustStore,
    open_package,
    write_package,
)
from cluster.processing import Processing, Softmax
from cluster.storage import Storage


def write(source: Path, storage: Storage, keys_dir: Path, **options: Any) -> PublishedPackage:
    return write_package(
        source,
        **{
            "name": "m",
            "kind": "graph",
            "storage": storage,
            "signer": LocalSigner(keys_dir),
            **options,
        },
    )


def is_empty(storage: Storage) -> bool:
    folder = Path(storage.root)
    return storage.list() == [] and not list((folder / ".staging").glob("*"))


def test_a_graph_is_described_from_its_file(published: PublishedPackage) -> None:
    manifest = published.manifest
    assert [str(s) for s in manifest.inputs] == ["x: FP32 [any, 2]"]
    assert [str(s) for s in manifest.outputs] == ["logits: FP32 [any, 3]"]
    assert sorted(manifest.files) == ["model/README.md", "model/model.onnx"]
    assert set(manifest.golden.outputs) == {"logits", "label"}
    assert manifest.metrics == {"accuracy": 0.5}
    assert published.location.endswith(published.digest.removeprefix("sha256:"))


def test_nothing_but_the_package_stays_in_storage(
    published: PublishedPackage, storage: Storage
) -> None:
    names = {key.split("/", 2)[2] for key in storage.list()}
    assert names == {"manifest.json", "signature.json", "model/model.onnx", "model/README.md"}
    assert not list((Path(storage.root) / ".staging").glob("*"))


def test_golden_inputs_lineage_and_profile_are_kept(
    graph_dir: Path, storage: Storage, keys_dir: Path
) -> None:
    published = write(
        graph_dir,
        storage,
        keys_dir,
        golden_inputs={"x": np.array([[1, 2]], np.float32)},
        lineage=Lineage(source="test", git_commit="abc"),
        profile={"x": {"mean": 0.5}},
    )
    assert published.manifest.golden.outputs == {"logits": [[1.0, 2.0, 0.0]]}
    assert published.manifest.lineage.git_commit == "abc"
    assert published.manifest.profile == {"x": {"mean": 0.5}}


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("weights.bin", "safetensors"),
        ("model.pt", "safetensors"),
        ("model.pth", "safetensors"),
        ("data.pkl", "safetensors"),
        ("code.py", "no code"),
        ("program.exe", "remove it"),
        (".hidden.json", "hidden"),
        ("sub/weights.bin", "safetensors"),
    ],
)
def test_forbidden_files_are_refused_with_the_fix(
    graph_dir: Path, storage: Storage, keys_dir: Path, name: str, hint: str
) -> None:
    (graph_dir / name).parent.mkdir(exist_ok=True)
    (graph_dir / name).write_bytes(b"x")
    with pytest.raises(ForbiddenFileError, match=hint):
        write(graph_dir, storage, keys_dir)
    assert is_empty(storage)


def test_links_are_refused(graph_dir: Path, storage: Storage, keys_dir: Path) -> None:
    (graph_dir / "link.json").symlink_to("/etc/hostname")
    with pytest.raises(ForbiddenFileError, match=r"link\.json"):
        write(graph_dir, storage, keys_dir)
    assert is_empty(storage)


def test_configurations_that_name_code_are_refused(
    graph_dir: Path, storage: Storage, keys_dir: Path
) -> None:
    (graph_dir / "tokenizer_config.json").write_text('{"a": [{"auto_map": {"X": "code.X"}}]}')
    with pytest.raises(ForbiddenFileError, match="auto_map"):
        write(graph_dir, storage, keys_dir)
    (graph_dir / "tokenizer_config.json").write_text('{"attn_implementation": "some/kernel"}')
    with pytest.raises(ForbiddenFileError, match="attn_implementation"):
        write(graph_dir, storage, keys_dir)
    (graph_dir / "tokenizer_config.json").write_text(
        '{"auto_map": null, "attn_implementation": "sdpa"}'
    )
    write(graph_dir, storage, keys_dir)


def test_a_word_of_the_vocabulary_is_not_a_reference_to_code(
    graph_dir: Path, storage: Storage, keys_dir: Path
) -> None:
    (graph_dir / "vocab.json").write_text('{"auto_map": 7}')
    write(graph_dir, storage, keys_dir)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"name": "no good"}, InvalidReferenceError),
        ({"kind": "adapter"}, PackageError),
        ({"processing": Processing(post=(Softmax(tensor="nothing"),))}, PackageError),
        ({"golden_inputs": {"y": np.zeros((1, 2), np.float32)}}, InputError),
        ({"golden_inputs": ["a prompt"]}, PackageError),
        ({"kind": "language_model"}, MissingFileError),
    ],
)
def test_what_does_not_fit_is_refused(
    graph_dir: Path, storage: Storage, keys_dir: Path, options: dict[str, Any], error: type
) -> None:
    with pytest.raises(error):
        write(graph_dir, storage, keys_dir, **options)
    assert is_empty(storage)


def test_a_directory_without_a_model_is_refused(
    tmp_path: Path, storage: Storage, keys_dir: Path
) -> None:
    with pytest.raises(MissingFileError, match="does not exist"):
        write(tmp_path / "none", storage, keys_dir)
    (tmp_path / "empty").mkdir()
    for kind in ("graph", "language_model"):
        with pytest.raises(MissingFileError):
            write(tmp_path / "empty", storage, keys_dir, kind=kind)


def save_graph(directory: Path, node: onnx.NodeProto, inputs: Any, outputs: Any) -> None:
    graph = helper.make_graph([node], "g", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, directory / "model.onnx")


def test_a_graph_that_answers_differently_each_time_is_refused(
    graph_dir: Path, storage: Storage, keys_dir: Path
) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 4])
    save_graph(graph_dir, helper.make_node("RandomNormalLike", ["x"], ["y"]), [x], [y])
    with pytest.raises(ParityError):
        write(graph_dir, storage, keys_dir)


def test_golden_inputs_are_found_for_images_of_any_size(
    graph_dir: Path, storage: Storage, keys_dir: Path
) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 3, "h", "w"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 3, "h2", "w2"])
    pool = helper.make_node("AveragePool", ["x"], ["y"], kernel_shape=[20, 20])
    save_graph(graph_dir, pool, [x], [y])
    published = write(graph_dir, storage, keys_dir)
    assert np.array(published.manifest.golden.inputs["x"]).shape == (2, 3, 32, 32)


def test_outputs_that_json_has_no_number_for_are_replayed(
    graph_dir: Path, storage: Storage, keys_dir: Path
) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b"])
    save_graph(graph_dir, helper.make_node("Log", ["x"], ["y"]), [x], [y])
    golden = {"x": np.array([-1, 0, 1], np.float32)}
    published = write(graph_dir, storage, keys_dir, golden_inputs=golden)
    assert published.manifest.golden.outputs == {"y": ["nan", "-inf", 0.0]}


def test_an_import_must_compute_numbers(graph_dir: Path, storage: Storage, keys_dir: Path) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b"])
    save_graph(graph_dir, helper.make_node("Log", ["x"], ["y"]), [x], [y])
    for golden in ([-1.0, -4.0], [1.0, -1.0], [0.0]):
        with pytest.raises(PackageError, match="output 'y' is not finite"):
            write(
                graph_dir,
                storage,
                keys_dir,
                golden_inputs={"x": np.array(golden, np.float32)},
                require_finite=True,
            )
    assert is_empty(storage)
    write(graph_dir, storage, keys_dir, require_finite=True)


def test_a_language_model_is_described_and_remembers_what_it_says(
    llama_dir: Path, storage: Storage, keys_dir: Path
) -> None:
    published = write(llama_dir, storage, keys_dir, kind="language_model")
    info = published.manifest.language_model
    assert info is not None
    assert (info.architecture, info.max_context_tokens) == ("LlamaForCausalLM", 128)
    assert (info.vocab_size, info.eos_token_ids, info.has_chat_template) == (257, (0,), False)
    golden: Any = published.manifest.golden
    assert len(golden.inputs["prompts"]) == len(golden.outputs["completions"]) == 4
    assert all(len(c) <= 8 for c in golden.outputs["completions"])


def test_weights_that_are_not_whole_are_refused(
    llama_dir: Path, storage: Storage, keys_dir: Path
) -> None:
    from safetensors.numpy import load_file, save_file

    weights = load_file(llama_dir / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, llama_dir / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PackageError, match="up_proj"):
        write(llama_dir, storage, keys_dir, kind="language_model")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "tokenizer.json").unlink(), "no tokenizer"),
        (lambda d: (d / "tokenizer.json").write_text("{}"), "tokenizer cannot be loaded"),
        (lambda d: (d / "config.json").unlink(), r"no config\.json"),
        (lambda d: (d / "config.json").write_text('{"model_type": "x"}'), "cannot be loaded"),
        (lambda d: (d / "config.json").write_text("{"), "not JSON"),
        (lambda d: (d / "model.safetensors").unlink(), "no safetensors"),
        (lambda d: (d / "model.safetensors").write_bytes(b"xx"), "cannot be loaded"),
    ],
)
def test_a_spoilt_model_directory_is_one_line(
    llama_dir: Path, storage: Storage, keys_dir: Path, spoil: Any, message: str
) -> None:
    spoil(llama_dir)
    with pytest.raises(PackageError, match=message) as caught:
        write(llama_dir, storage, keys_dir, kind="language_model")
    assert "\n" not in str(caught.value)
    assert is_empty(storage)


def test_a_missing_shard_is_named(llama_dir: Path, storage: Storage, keys_dir: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model.safetensors"}}
    (llama_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(MissingFileError, match="model-00001-of-00002"):
        write(llama_dir, storage, keys_dir, kind="language_model")


def test_a_full_disk_leaves_nothing_behind(
    small_disk: Path, graph_dir: Path, keys_dir: Path
) -> None:
    storage = Storage.open(str(small_disk))
    (graph_dir / "big.txt").write_bytes(bytes(200_000))
    with pytest.raises(MachineError, match="No space left") as caught:
        write(graph_dir, storage, keys_dir)
    assert "\n" not in str(caught.value)
    assert is_empty(storage)


def test_packages_live_in_object_stores_too(
    s3_root: str, graph_dir: Path, keys_dir: Path, cache_dir: Path
) -> None:
    storage = Storage.open(s3_root)
    published = write(graph_dir, storage, keys_dir)
    package = open_package(
        published.digest, storage=storage, trust=TrustStore(keys_dir), cache_dir=cache_dir
    )
    assert package.manifest == published.manifest
    storage.write_bytes(f"packages/{published.digest.removeprefix('sha256:')}/model/x.json", b"{}")
    with pytest.raises(PackageError, match=r"x\.json"):
        open_package(
            published.digest,
            storage=storage,
            trust=TrustStore(keys_dir),
            cache_dir=cache_dir / "other",
        )
