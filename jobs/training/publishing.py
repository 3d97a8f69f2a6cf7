"""From a trained model to a registered version: package, register, alias `candidate`.

It knows nothing of training itself.

    version = publish(outcome, config, dataset, settings, run_id="…", job_id="…")
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

from cluster.model_package import Lineage, encrypting_keyset, open_signer, write_package
from cluster.model_package.adapter import merge_into
from cluster.publishing import register_candidate
from cluster.registry import ModelVersion
from cluster.settings import Settings
from cluster.storage import Storage
from jobs.data.dataset import Dataset
from jobs.models.bases import Base
from jobs.models.config import PretrainedLmConfig
from jobs.models.family import Exported
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
    base: Base | None = None,
) -> ModelVersion:
    """Raises PackageError if the exported model is not fit for a package.

    Args:
        base: what the model goes on from, if it does.
    """
    storage, parent = Storage.open(settings.storage_root), base.package if base else None
    with _settled(outcome.exported, config, base, storage) as (exported, parity):
        package = write_package(
            exported.directory,
            name=config.name,
            kind=exported.kind,
            storage=storage,
            signer=open_signer(settings),
            keyset=encrypting_keyset(settings),
            processing=exported.processing,
            golden_inputs=exported.golden_inputs,
            lineage=Lineage(
                source="jobs.train",
                dataset_digest=dataset.info.digest,
                run_id=run_id,
                job_id=job_id,
                git_commit=git_commit,
                sweep_run_id=sweep_run_id,
                parent_digest=parent.digest if parent else "",
            ),
            metrics=outcome.metrics,
            profile=data_profile(dataset, outcome.exported),
            base=parent if exported.kind == "adapter" else None,
            parity=parity,
        )
    reason = f"trained by run {run_id}"
    if sweep_run_id:
        reason += f", the best trial of sweep {sweep_run_id}"
    return register_candidate(
        config.name, package, settings, run_id=run_id, actor="jobs.train", reason=reason
    )


@contextlib.contextmanager
def _settled(
    exported: Exported, config: TrainConfig, base: Base | None, storage: Storage
) -> Iterator[tuple[Exported, dict[str, float]]]:
    """What is packaged: an adapter is merged into its base first where the config says so."""
    model = config.model
    wants_merge = isinstance(model, PretrainedLmConfig) and model.lora and model.lora.merge
    if not wants_merge or base is None:
        yield exported, {}
        return
    prompts = exported.golden_inputs
    assert isinstance(prompts, Sequence), "an adapter's golden inputs are prompts"
    with storage.staging() as stage:
        directory = stage / "merged"
        directory.mkdir()
        parity = merge_into(directory, base.directory, exported.directory, prompts)
        yield replace(exported, kind="language_model", directory=directory), parity
