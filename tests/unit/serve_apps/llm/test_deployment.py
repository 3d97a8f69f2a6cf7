"""A replica answers the golden prompts before any other, an adapter together with its base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.errors import NotFoundError, PackageError
from cluster.model_package import LocalSigner, ensure_local_key, open_digest, write_package
from cluster.settings import Settings
from cluster.storage import Storage
from serve_apps.llm.continuous_batching import ContinuousBatchingEngine
from serve_apps.llm.deployment import LanguageModel
from serve_apps.llm.native.engine import NativeEngine
from tests.tiny_models import save_adapter, save_llama


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    settings = Settings(home=tmp_path / "home")
    monkeypatch.setenv("HELIOSTAT_HOME", str(settings.home))
    ensure_local_key(settings.keys_dir)
    return settings


def publish(model_dir: Path, settings: Settings) -> str:
    return write_package(
        model_dir,
        name="model",
        kind="language_model",
        storage=Storage.open(settings.storage_root),
        signer=LocalSigner(settings.keys_dir),
    ).digest


@pytest.mark.parametrize(
    ("options", "engine", "precision"),
    [
        ({}, NativeEngine, "float32"),
        ({"dtype": "bfloat16"}, NativeEngine, "bfloat16"),
        ({"engine": "native", "weights": "int8"}, NativeEngine, "int8"),
        ({"engine": "transformers"}, ContinuousBatchingEngine, "float32"),
    ],
)
def test_the_native_engine_serves_what_it_can_read(
    language_model_dir: Path,
    settings: Settings,
    options: dict[str, Any],
    engine: type,
    precision: str,
) -> None:
    replica = LanguageModel(publish(language_model_dir, settings), options)
    assert isinstance(replica._runner._engine, engine)
    assert replica._runner.stats().precision == precision
    replica._runner.close()


def test_what_the_native_engine_cannot_read_is_served_by_transformers(
    tmp_path: Path, settings: Settings
) -> None:
    directory = save_llama(tmp_path / "olmo", "some text", architecture="Olmo2")
    digest = publish(directory, settings)
    replica = LanguageModel(digest, {})
    assert isinstance(replica._runner._engine, ContinuousBatchingEngine)
    replica._runner.close()
    with pytest.raises(PackageError, match="the native engine cannot run this model: models of"):
        LanguageModel(digest, {"engine": "native"})


def test_an_adapter_is_served_merged_into_its_base(
    language_model_dir: Path, tmp_path: Path, settings: Settings
) -> None:
    storage = Storage.open(settings.storage_root)
    signer = LocalSigner(settings.keys_dir)
    base = write_package(
        language_model_dir, name="base", kind="language_model", storage=storage, signer=signer
    )
    adapter = write_package(
        save_adapter(tmp_path / "adapter", language_model_dir),
        name="adapter",
        kind="adapter",
        storage=storage,
        signer=signer,
        base=open_digest(base.digest, settings),
    )
    assert adapter.manifest.golden.outputs != base.manifest.golden.outputs
    # Starting it replays the adapter's golden prompts.
    for engine in ("native", "transformers"):
        LanguageModel(adapter.digest, {"engine": engine})._runner.close()
    storage.delete_dir(f"packages/{base.digest.removeprefix('sha256:')}")
    for entry in settings.package_cache_dir.glob(base.digest.removeprefix("sha256:")):
        entry.rename(tmp_path / "gone")
    with pytest.raises(NotFoundError, match=f"the base of adapter {adapter.digest} is not there"):
        LanguageModel(adapter.digest, {})
