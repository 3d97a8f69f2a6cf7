"""From the candidate that was chosen to a registered version: package, register, alias.

version = publish(found, package, parent, settings, name="digits", split="test", run_id="…")
"""

from __future__ import annotations

from cluster.model_package import (
    Lineage,
    ModelPackage,
    encrypting_keyset,
    open_signer,
    write_package,
)
from cluster.model_package.golden import graph_inputs
from cluster.model_package.parity import golden_texts
from cluster.publishing import register_candidate
from cluster.registry import ModelVersion
from cluster.settings import Settings
from cluster.storage import Storage
from cluster.submission import git_commit
from jobs.compression.search import Found


def publish(
    found: Found,
    package: ModelPackage,
    parent: ModelVersion,
    settings: Settings,
    *,
    name: str,
    split: str,
    run_id: str,
) -> ModelVersion:
    """The compressed version, of the parent's kind and with its golden inputs.

    Args:
        package: the parent's.
        split: what `found` was measured on.

    Raises:
        PackageError: the compressed model is not fit for a package.
    """
    assert found.kept is not None, "only what was chosen is published"
    tried, manifest = found.chosen, package.manifest
    published = write_package(
        found.kept.package.model_dir,
        name=name,
        kind=manifest.kind,
        storage=Storage.open(settings.storage_root),
        signer=open_signer(settings),
        keyset=encrypting_keyset(settings),
        processing=manifest.processing,
        golden_inputs=(
            graph_inputs(manifest) if manifest.kind == "graph" else golden_texts(package)
        ),
        lineage=Lineage(
            source="jobs.compress",
            dataset_digest=manifest.lineage.dataset_digest,
            run_id=run_id,
            git_commit=settings.git_commit or git_commit(settings.source_dir) or "unknown",
            parent_digest=parent.digest,
        ),
        metrics={f"{split}/{metric}": value for metric, value in tried.metrics.items()},
        profile=manifest.profile,
        parity=tried.parity,
        quantisation=found.kept.quantisation,
    )
    return register_candidate(
        name,
        published,
        settings,
        run_id=run_id,
        actor="jobs.compress",
        reason=f"made from {parent.ref}: {found.decision.reason}",
    )
