"""Adapters merged into their bases: whole language models that any reader can serve.

with merged(base.directory, adapter_dir, storage) as (directory, parity): ...
version = merge_version(adapter, settings, name="helper", actor="jobs.merge")
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from cluster.model_package import (
    Lineage,
    LocalSigner,
    open_base,
    open_version,
    write_package,
)
from cluster.model_package.adapter import merge_into
from cluster.model_package.parity import golden_texts
from cluster.model_ref import CANDIDATE
from cluster.registry import ModelRegistry, ModelVersion
from cluster.settings import Settings
from cluster.storage import Storage


@contextlib.contextmanager
def merged(
    base_dir: Path, adapter_dir: Path, prompts: Sequence[str], storage: Storage
) -> Iterator[tuple[Path, dict[str, float]]]:
    """A directory with the whole model, gone at the end, and how far its logits are off.

    Raises:
        ParityError: further than rounding explains.
    """
    with storage.staging() as stage:
        directory = stage / "merged"
        directory.mkdir()
        yield directory, merge_into(directory, base_dir, adapter_dir, prompts)


def merge_version(
    adapter: ModelVersion, settings: Settings, *, name: str, actor: str
) -> ModelVersion:
    """Register an adapter merged into its base as the next version of `name`.

    Raises:
        ParityError: the merged model answers otherwise.
    """
    package = open_version(adapter, settings)
    manifest, storage = package.manifest, Storage.open(settings.storage_root)
    prompts = golden_texts(package)
    base = open_base(package, settings)
    with merged(base.model_dir, package.model_dir, prompts, storage) as (directory, parity):
        published = write_package(
            directory,
            name=name,
            kind="language_model",
            storage=storage,
            signer=LocalSigner(settings.keys_dir),
            golden_inputs=prompts,
            lineage=Lineage(
                source="merge",
                dataset_digest=manifest.lineage.dataset_digest,
                run_id=manifest.lineage.run_id,
                git_commit=manifest.lineage.git_commit,
                parent_digest=adapter.digest,
            ),
            metrics=manifest.metrics,
            profile=manifest.profile,
            parity=parity,
        )
    registry = ModelRegistry.open(settings)
    version = registry.register(name, published, run_id=adapter.run_id)
    reason = f"{adapter.ref} merged into its base"
    registry.set_alias(version.name, CANDIDATE, version.version, actor=actor, reason=reason)
    return version
