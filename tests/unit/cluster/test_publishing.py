"""What was packaged is listed and a candidate, or there is nothing of it."""

from __future__ import annotations

import uuid
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cluster.errors import NotRunningError, RevokedKeyError
from cluster.garbage import find_garbage
from cluster.model_package import (
    LocalSigner,
    PublishedPackage,
    ensure_local_key,
    open_keyset,
    write_package,
)
from cluster.model_package.keys import SigningKeys
from cluster.publishing import register_candidate, require_publishing
from cluster.registry import ModelRegistry
from cluster.settings import Settings
from cluster.storage import Storage
from cluster.tracking import open_client


@pytest.fixture
def name() -> str:
    """MLflow's server is shared by the tests, so each has its own model."""
    return f"linear-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def published(settings: Settings, name: str, tmp_path: Path) -> PublishedPackage:
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "W"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(np.eye(2, 3, dtype=np.float32), "W")],
    )
    (tmp_path / "graph").mkdir()
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "graph/model.onnx")
    ensure_local_key(settings.keys_dir)
    return write_package(
        tmp_path / "graph",
        name=name,
        kind="graph",
        storage=Storage.open(settings.storage_root),
        signer=LocalSigner(settings.keys_dir),
    )


def test_it_becomes_the_candidate(
    published: PublishedPackage, settings: Settings, name: str
) -> None:
    version = register_candidate(name, published, settings, actor="test", reason="why")
    assert (version.aliases, version.digest) == (("candidate",), published.digest)
    assert [change.reason for change in ModelRegistry.open(settings).history(name)] == ["why"]


@pytest.mark.parametrize("stopped_by", [KeyboardInterrupt, SystemExit])
def test_who_is_stopped_while_it_is_listed_leaves_nothing(
    published: PublishedPackage, settings: Settings, name: str,
    monkeypatch: pytest.MonkeyPatch, stopped_by: type[BaseException],
) -> None:  # fmt: skip
    def stopped(*_: object) -> None:
        """MLflow has the version by now, and the registry has not."""
        assert len(open_client(settings).search_model_versions(f"name = '{name}'")) == 1
        raise stopped_by

    monkeypatch.setattr(ModelRegistry, "_require_stored", stopped)
    with pytest.raises(stopped_by):
        register_candidate(name, published, settings, actor="test", reason="why")
    assert not Path(published.location).exists()
    assert ModelRegistry.open(settings).list_versions(name) == []
    assert not open_client(settings).search_model_versions(f"name = '{name}'")


def test_what_is_listed_stays_whatever_comes_after(
    published: PublishedPackage, settings: Settings, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ModelRegistry, "set_alias", stopped)
    with pytest.raises(KeyboardInterrupt):
        register_candidate(name, published, settings, actor="test", reason="why")
    assert Path(published.location).exists()
    assert len(ModelRegistry.open(settings).list_versions(name)) == 1


def test_what_is_missing_to_publish_is_found_before_the_work(
    settings: Settings, settings_without_server: Settings, s3_root: str
) -> None:
    elsewhere = settings.model_copy(update={"storage_url": s3_root.replace("@bucket", "@bucke")})
    with pytest.raises(NotRunningError, match="bucket 'bucke'"):
        require_publishing(elsewhere)
    with pytest.raises(NotRunningError, match="bucket 'bucke'"):
        find_garbage(elsewhere, older_than_s=0)
    with pytest.raises(NotRunningError, match="MLflow"):
        require_publishing(settings_without_server)
    with pytest.raises(NotRunningError, match="signing key"):
        require_publishing(settings)
    fingerprint = ensure_local_key(settings.keys_dir)
    require_publishing(settings)
    encrypting = settings.model_copy(update={"encrypt_packages": True})
    with pytest.raises(NotRunningError, match="encryption keyset"):
        require_publishing(encrypting)
    open_keyset(encrypting).ensure()
    require_publishing(encrypting)
    SigningKeys(settings.keys_dir).revoke(fingerprint, reason="test")
    with pytest.raises(RevokedKeyError):
        require_publishing(encrypting)
