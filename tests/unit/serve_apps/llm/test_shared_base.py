"""What stands for an adapter begins only once its base answers for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.database import open_database
from cluster.errors import NotFoundError, PackageError, UpstreamFailedError
from cluster.model_package import LocalSigner, ensure_local_key, open_digest, write_package
from cluster.releases import ReleaseStore
from cluster.settings import Settings
from cluster.storage import Storage
from serve_apps.llm import shared_base
from serve_apps.llm.deployment import LanguageModel
from serve_apps.llm.shared_base import AdapterOnBase
from tests.tiny_models import save_adapter


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    settings = Settings(home=tmp_path / "home")
    monkeypatch.setenv("HELIOSTAT_HOME", str(settings.home))
    ensure_local_key(settings.keys_dir)
    return settings


@pytest.fixture
def digests(language_model_dir: Path, tmp_path: Path, settings: Settings) -> tuple[str, str]:
    """A base and its adapter."""
    values: dict[str, Any] = {
        "storage": Storage.open(settings.storage_root),
        "signer": LocalSigner(settings.keys_dir),
    }
    base = write_package(language_model_dir, name="base", kind="language_model", **values)
    adapter = write_package(
        save_adapter(tmp_path / "adapter", language_model_dir),
        name="adapter",
        kind="adapter",
        base=open_digest(base.digest, settings),
        **values,
    )
    return base.digest, adapter.digest


@pytest.fixture
def handles(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Replicas of this process by their applications' names; of what is not there, none answers."""
    replicas: dict[str, Any] = {}

    class Handles:
        def forget(self, _: str) -> None:
            pass

        async def call(self, application: str, method: str, *arguments: Any, **_: Any) -> Any:
            replica = replicas.pop("soon", None) or replicas[application]
            if isinstance(replica, Exception):
                raise replica
            return await getattr(replica, method)(*arguments)

    monkeypatch.setattr(shared_base, "Handles", Handles)
    monkeypatch.setattr(shared_base, "_RETRY_S", 0.001)
    return replicas


async def begin(digest: str) -> AdapterOnBase:
    replica = AdapterOnBase.__new__(AdapterOnBase)
    await AdapterOnBase.__init__(replica, digest, {})  # type: ignore[func-returns-value]
    return replica


async def test_it_begins_once_its_base_holds_the_adapter(
    digests: tuple[str, str],
    settings: Settings,
    handles: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, adapter = digests
    with pytest.raises(NotFoundError, match=r"the base of adapter .* is not served"):
        await begin(adapter)
    with ReleaseStore(open_database(settings.database)).writing() as tables:
        row = tables.create("base", 4, base, {}, "asked", requested_by="ops")
        tables.promote(row, actor="ops", reason="ready")
    with pytest.raises(PackageError, match="is no adapter"):
        await begin(base)
    replica = LanguageModel(base, {})
    try:
        # The whole cluster may be on its way up.
        handles.update({"base.v4": replica, "soon": UpstreamFailedError("not running")})
        found = await (await begin(adapter)).describe()
        assert (found.digest, found.device) == (adapter, "cpu")
        monkeypatch.setattr(shared_base, "_BASE_TIMEOUT_S", 0)
        handles["soon"] = UpstreamFailedError("not running")
        with pytest.raises(UpstreamFailedError, match="not running"):
            await begin(adapter)
        handles["base.v4"] = LanguageModel(base, {"max_adapters": 0})
        with pytest.raises(NotFoundError, match="not loaded beside this model"):
            await begin(adapter)
    finally:
        replica._runner.close()
        handles["base.v4"]._runner.close()
        open_database.cache_clear()
