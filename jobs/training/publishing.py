"""From a trained model to a registered version: package, register, alias `candidate`.

It knows nothing of training itself.

    version = publish(outcome, config, dataset, settings, run_id="…", job_id="…")
"""

from __future__ import annotations

from cluster.model_package import Lineage, LocalSigner, write_package
from cluster.model_ref import CANDIDATE
from cluster.registry import ModelRegistry, ModelVersion
from cluster.settings import Settings
from cluster.storage import Storage
from jobs.data.dataset import Dataset
from jobs.training.config import TrainConfig
from jobs.training.profile import data_profile
from jobs.training.worker import Outcome


def publish(
    outcome: Outcome,
    config: TrainConfig,
    dataset: Dataset,
    settings: Settings,
    *,
    run_id: str,
    job_id: str,
    git_commit: str,
    sweep_run_id: str = "",
) -> ModelVersion:
    """Raises PackageError if the exported model is not fit for a package."""
    exported = outcome.exported
    package = write_package(
        exported.directory,
        name=config.name,
        kind=exported.kind,
        storage=Storage.open(settings.storage_root),
        signer=LocalSigner(settings.keys_dir),
        processing=exported.processing,
        golden_inputs=exported.golden_inputs,
        lineage=Lineage(
            source="jobs.train",
            dataset_digest=dataset.info.digest,
            run_id=run_id,
            job_id=job_id,
            git_commit=git_commit,
            sweep_run_id=sweep_run_id,
        ),
        metrics=outcome.metrics,
        profile=data_profile(dataset),
    )
    registry = ModelRegistry.open(settings)
    version = registry.register(config.name, package, run_id=run_id)
    registry.set_alias(
        config.name,
        CANDIDATE,
        version.version,
        actor="jobs.train",
        reason=f"trained by run {run_id}"
        + (f", the best trial of sweep {sweep_run_id}" if sweep_run_id else ""),
    )
    return version
