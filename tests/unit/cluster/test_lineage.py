"""A package's origins are held against what is here, down to the bytes of the data."""

from __future__ import annotations

import hashlib
import json
import uuid
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cluster.errors import ChangedFileError
from cluster.lineage import Link, trace
from cluster.model_package import (
    Lineage,
    LocalSigner,
    ModelPackage,
    PublishedPackage,
    ensure_local_key,
    open_digest,
    write_package,
)
from cluster.settings import Settings
from cluster.storage import Storage
from cluster.submission import git_commit

DATA = b"rows" * 1000


@pytest.fixture(params=["folder", "s3"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    url = ""
    if request.param == "s3":
        root: str = request.getfixturevalue("s3_root")
        url = root.replace("/root?", f"/{uuid.uuid4().hex}?")
    settings = Settings(home=tmp_path / "home", storage_url=url)
    ensure_local_key(settings.keys_dir)
    return settings


@pytest.fixture
def commit(settings: Settings) -> str:
    return git_commit(settings.source_dir).removesuffix("-dirty")


def save_dataset(settings: Settings) -> str:
    """A dataset as `jobs.prepare` leaves it; its digest."""
    file = {"sha256": hashlib.sha256(DATA).hexdigest(), "size_bytes": len(DATA)}
    description = {"name": "zäh", "files": {"train.arrow": file}}
    text = json.dumps(description, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(text.encode()).hexdigest()
    storage = Storage.open(settings.storage_root)
    storage.write_bytes(f"datasets/d/{digest}/dataset.json", json.dumps(description).encode())
    storage.write_bytes(f"datasets/d/{digest}/train.arrow", DATA)
    return f"sha256:{digest}"


def publish(settings: Settings, tmp_path: Path, lineage: Lineage) -> PublishedPackage:
    weights = numpy_helper.from_array(np.eye(2, dtype=np.float32), "W")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "W"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2])],
        [weights],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    directory = tmp_path / uuid.uuid4().hex
    directory.mkdir()
    onnx.save(model, directory / "model.onnx")
    return write_package(
        directory,
        name="linear",
        kind="graph",
        storage=Storage.open(settings.storage_root),
        signer=LocalSigner(settings.keys_dir),
        lineage=lineage,
    )


def package(settings: Settings, tmp_path: Path, lineage: Lineage) -> ModelPackage:
    return open_digest(publish(settings, tmp_path, lineage).digest, settings)


def states(links: list[Link]) -> list[tuple[str, str, int]]:
    return [(link.what, link.state, link.depth) for link in links]


def test_every_link_is_checked_and_so_are_its_parents(
    settings: Settings, tmp_path: Path, commit: str
) -> None:
    data = save_dataset(settings)
    parent = publish(settings, tmp_path, Lineage(dataset_digest=data, git_commit=commit))
    child = Lineage(
        source="jobs.train",
        dataset_digest=data,
        git_commit=f"{commit}-dirty",
        run_id="r1",
        parent_digest=parent.digest,
    )
    links = list(trace(package(settings, tmp_path, child), settings))
    assert states(links) == [
        ("package", "verified", 0),
        ("dataset", "verified", 0),
        ("commit", "recorded", 0),
        ("run", "recorded", 0),
        ("parent", "verified", 0),
        ("dataset", "verified", 1),
        ("commit", "verified", 1),
    ]
    assert "signed by key" in links[0].note
    assert links[1].note == "zäh, 1 file, 0.0 MB"
    assert "not committed" in links[2].note
    assert links[4].identity == parent.digest


@pytest.mark.parametrize("file", ["train.arrow", "dataset.json"])
@pytest.mark.parametrize("change", ["flipped", "removed"])
def test_data_that_has_changed_is_an_error(
    settings: Settings, tmp_path: Path, file: str, change: str
) -> None:
    data = save_dataset(settings)
    found = package(settings, tmp_path, Lineage(dataset_digest=data))
    storage = Storage.open(settings.storage_root)
    key = f"datasets/d/{data.removeprefix('sha256:')}/{file}"
    if change == "flipped":
        content = storage.read_bytes(key)
        storage.write_bytes(key, content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
    else:
        storage.delete_file(key)
    if (file, change) == ("dataset.json", "removed"):
        assert [link.state for link in trace(found, settings)][1] == "absent"
        return
    with pytest.raises(ChangedFileError, match=file):
        list(trace(found, settings))
    if file == "train.arrow":
        described = list(trace(found, settings, with_data=False))[1]
        assert (described.state, described.note) == ("verified", "zäh, 1 file, 0.0 MB, not read")


def test_what_is_not_here_or_not_named_is_said_to_be_so(settings: Settings, tmp_path: Path) -> None:
    elsewhere = f"sha256:{'0' * 64}"
    lineage = Lineage(dataset_digest=elsewhere, git_commit="0" * 40, parent_digest=elsewhere)
    links = list(trace(package(settings, tmp_path, lineage), settings))
    assert [link.state for link in links] == ["verified", "absent", "absent", "absent"]
    bare = list(trace(package(settings, tmp_path, Lineage()), settings))
    assert states(bare)[1:] == [("dataset", "unknown", 0), ("commit", "unknown", 0)]


def test_while_storage_is_down_its_links_are_absent(settings: Settings, tmp_path: Path) -> None:
    data = save_dataset(settings)
    found = package(settings, tmp_path, Lineage(dataset_digest=data))
    down = Settings(home=settings.home, storage_url=str(tmp_path / "unmounted"))
    link = list(trace(found, down))[1]
    assert link.state == "absent"
    assert f"{tmp_path / 'unmounted'} is not there" in link.note


def test_a_tampered_parent_is_an_error_that_names_it(settings: Settings, tmp_path: Path) -> None:
    parent = publish(settings, tmp_path, Lineage(source="parent"))
    found = package(settings, tmp_path, Lineage(parent_digest=parent.digest))
    storage = Storage.open(settings.storage_root)
    key = f"packages/{parent.digest.removeprefix('sha256:')}/model/model.onnx"
    content = storage.read_bytes(key)
    storage.write_bytes(key, content + b"\0")
    with pytest.raises(ChangedFileError, match=f"parent {parent.digest}.*model.onnx"):
        list(trace(found, settings))
