"""A model derived from a registered version: certified, packaged, registered, a candidate.

It knows nothing of how models are derived.

    derived = export_graph(parent, directory, …)
    version = publish_derived(derived, directory, parent, Publication(…), settings)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cluster.model_package import (
    Kind,
    Lineage,
    ModelPackage,
    encrypting_keyset,
    open_signer,
    write_package,
)
from cluster.model_package.writer import GoldenInputs
from cluster.processing import Processing
from cluster.publishing import register_candidate
from cluster.registry import ModelVersion
from cluster.settings import Settings
from cluster.storage import Storage


@dataclass(frozen=True)
class Derived:
    """What was made in a directory."""

    kind: Kind
    parity: dict[str, float]
    golden_inputs: GoldenInputs
    processing: Processing
    what: str
    """What became of the parent, for the alias history."""


def publish_derived(
    derived: Derived,
    directory: Path,
    parent: ModelPackage,
    version: ModelVersion,
    name: str,
    settings: Settings,
) -> ModelVersion:
    """Register the model in `directory` as the next version of `name`, and make it the candidate.

    It keeps what the parent says of its data and quality: it is the same model.

    Args:
        version: what the parent is registered as.
    """
    lineage = parent.manifest.lineage
    published = write_package(
        directory,
        name=name,
        kind=derived.kind,
        storage=Storage.open(settings.storage_root),
        signer=open_signer(settings),
        keyset=encrypting_keyset(settings),
        processing=derived.processing,
        golden_inputs=derived.golden_inputs,
        lineage=Lineage(
            source="jobs.export",
            dataset_digest=lineage.dataset_digest,
            run_id=lineage.run_id,
            git_commit=lineage.git_commit,
            parent_digest=parent.digest,
        ),
        metrics=parent.manifest.metrics,
        profile=parent.manifest.profile,
        parity=derived.parity,
    )
    return register_candidate(
        name,
        published,
        settings,
        run_id=version.run_id,
        actor="jobs.export",
        reason=f"{version.ref} {derived.what}",
    )
