"""Merge an adapter version into its base, and register the whole model.

    python -m jobs.merge --config configs/merge/pydoc_helper.yaml
    python -m jobs.merge --config configs/merge/pydoc_helper.yaml --set adapter=helper/3

Both packages are verified; the merged one is registered only if its logits are the adapter's.
"""

from __future__ import annotations

import json

from pydantic import Field

from cluster.config import StrictModel
from cluster.errors import InputError
from cluster.model_ref import CANDIDATE, ModelRef
from cluster.registry import ModelRegistry, ModelVersion
from cluster.settings import Settings
from jobs._entrypoint import run_job
from jobs.data.config import Name
from jobs.training.merging import merge_version


class MergeConfig(StrictModel):
    """One adapter to merge."""

    adapter: str = Field(min_length=1)
    """NAME, NAME@ALIAS or NAME/VERSION of a version of kind adapter."""
    name: Name
    """Name the whole model is registered under; may be the adapter's own."""


def merge(config: MergeConfig, settings: Settings) -> None:
    """Merge, register and say what it became."""
    adapter = find_adapter(config, settings)
    version = merge_version(adapter, settings, name=config.name, actor="jobs.merge")
    print(f"registered {version.ref} ({version.digest}), {adapter.ref} merged into its base")
    print(f"deploy it: heliostat deploy {version.name}@{CANDIDATE}")
    result = {"name": version.name, "version": version.version, "digest": version.digest}
    print("result: " + json.dumps(result), flush=True)


def check(config: MergeConfig, settings: Settings) -> None:
    """There is such an adapter."""
    print(f"config is valid; would merge {find_adapter(config, settings).ref}")


def find_adapter(config: MergeConfig, settings: Settings) -> ModelVersion:
    """Raises NotFoundError for no version, InputError for one that is no adapter."""
    version = ModelRegistry.open(settings).resolve(ModelRef.parse(config.adapter))
    if version.kind != "adapter":
        raise InputError(
            f"{version.ref} is of kind '{version.kind}', expected an adapter",
            hint="name a version that was trained with model.lora and without merge",
            param="adapter",
        )
    return version


if __name__ == "__main__":
    run_job(
        MergeConfig,
        verb="merge",
        description="Merge an adapter into its base and register the whole model.",
        run=merge,
        check=check,
    )
