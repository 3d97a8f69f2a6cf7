"""What `models import` does: prepare, package, register; nothing is left behind on failure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cluster.errors import HeliostatError
from cluster.model_package import Lineage, LocalSigner, PublishedPackage, package_key, write_package
from cluster.model_package.importing import prepare_import
from cluster.model_ref import CANDIDATE
from cluster.registry import ModelRegistry, ModelVersion
from cluster.settings import Settings
from cluster.storage import Storage
from cluster.tracking import require_server

Say = Callable[[str], None]


def import_path(path: Path, name: str, settings: Settings, *, say: Say) -> ModelVersion:
    """Package the model at `path`, register it as `name` and make it the candidate.

    Raises:
        HeliostatError: one line, naming what is wrong with the model or which part is down.
    """
    storage = Storage.open(settings.storage_root)
    with storage.staging() as stage:
        prepared = prepare_import(path, stage)
        # Before the long work: without the server nothing can be registered.
        require_server(settings)
        signer = LocalSigner(settings.keys_dir)
        say(f"read {path}")
        for note in prepared.notes:
            say(note)
        say("computing golden outputs, signing and publishing")
        published = write_package(
            stage,
            name=name,
            kind=prepared.kind,
            storage=storage,
            signer=signer,
            lineage=Lineage(source="import"),
        )
    return _register(ModelRegistry.open(settings), name, published, storage)


def _register(
    registry: ModelRegistry, name: str, published: PublishedPackage, storage: Storage
) -> ModelVersion:
    try:
        version = registry.register(name, published)
    except HeliostatError:
        storage.delete_dir(package_key(published.digest))
        raise
    registry.set_alias(name, CANDIDATE, version.version, actor="models import", reason="imported")
    return registry.resolve(version.ref)
