"""A replica answers the golden prompts before any other, an adapter together with its base."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.errors import NotFoundError
from cluster.model_package import LocalSigner, ensure_local_key, open_digest, write_package
from cluster.settings import Settings
from cluster.storage import Storage
from serve_apps.llm.deployment import LanguageModel
from tests.tiny_models import save_adapter


def test_an_adapter_is_served_merged_into_its_base(
    language_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(home=tmp_path / "home")
    monkeypatch.setenv("HELIOSTAT_HOME", str(settings.home))
    storage = Storage.open(settings.storage_root)
    ensure_local_key(settings.keys_dir)
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
    replica = LanguageModel(adapter.digest, {})
    replica._runner.close()
    storage.delete_dir(f"packages/{base.digest.removeprefix('sha256:')}")
    for entry in settings.package_cache_dir.glob(base.digest.removeprefix("sha256:")):
        entry.rename(tmp_path / "gone")
    with pytest.raises(NotFoundError, match=f"the base of adapter {adapter.digest} is not there"):
        LanguageModel(adapter.digest, {})
