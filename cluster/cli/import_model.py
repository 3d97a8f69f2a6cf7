"""What `models import` does: prepare, package, register; nothing is left behind on failure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cluster.model_package import (
    Lineage,
    ModelPackage,
    encrypting_keyset,
    open_signer,
    open_version,
    write_package,
)
from cluster.model_package.importing import prepare_import
from cluster.model_ref import ModelRef
from cluster.model_versions import require_language_model
from cluster.publishing import register_candidate, require_publishing
from cluster.registry import ModelRegistry, ModelVersion
from cluster.settings import Settings
from cluster.storage import Storage

Say = Callable[[str], None]


def import_path(
    path: Path, name: str, settings: Settings, *, say: Say, base: str | None = None
) -> ModelVersion:
    """Package the model at `path`, register it as `name` and make it the candidate.

    Args:
        base: NAME, NAME@ALIAS or NAME/VERSION of what an adapter was trained on.

    Raises:
        HeliostatError: one line, naming what is wrong with the model or which part is down.
    """
    storage = Storage.open(settings.storage_root)
    base_package = _open_base(base, settings) if base is not None else None
    with storage.staging() as stage:
        prepared = prepare_import(path, stage, base_package)
        # Before the long work: without the server nothing can be registered.
        require_publishing(settings)
        say(f"read {path}")
        for note in prepared.notes:
            say(note)
        say("computing golden outputs, signing and publishing")
        published = write_package(
            stage,
            name=name,
            kind=prepared.kind,
            storage=storage,
            signer=open_signer(settings),
            keyset=encrypting_keyset(settings),
            processing=prepared.processing,
            golden_inputs=prepared.golden_inputs,
            lineage=Lineage(source="import"),
            profile=prepared.profile,
            base=base_package,
            parity=prepared.parity,
            require_finite=True,
        )
    return register_candidate(name, published, settings, actor="models import", reason="imported")


def _open_base(reference: str, settings: Settings) -> ModelPackage:
    version = ModelRegistry.open(settings).resolve(ModelRef.parse(reference))
    require_language_model(version, "--base", hint="name what the adapter was trained on")
    return open_version(version, settings)
