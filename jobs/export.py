"""Derive a version in another form from a registered one: an ONNX graph, or a merged adapter.

    python -m jobs.export --config configs/export/pydoc_lm_onnx.yaml
    python -m jobs.export --config configs/export/pydoc_helper_merged.yaml --set model=helper/3

The parent is verified, and its golden inputs are replayed on both: what differs by more than the
tolerance is not registered. Files for other tools: `heliostat models export REF --to DIR`.
"""

from __future__ import annotations

import json
from pathlib import Path

from cluster.errors import InputError
from cluster.model_package import ModelPackage, open_base, open_version
from cluster.model_package.parity import RELATIVE_TOLERANCES
from cluster.model_ref import CANDIDATE, ModelRef
from cluster.publishing import require_publishing
from cluster.registry import ModelRegistry, ModelVersion
from cluster.settings import Settings
from cluster.storage import Storage
from jobs._entrypoint import run_job
from jobs.exporting.config import ExportConfig
from jobs.exporting.derived import Derived, publish_derived

_KINDS = {"onnx": ("language_model", "graph"), "merged": ("adapter",)}


def export(config: ExportConfig, settings: Settings) -> None:
    """Derive, certify, register and say what it became."""
    version = find_version(config, settings)
    require_publishing(settings)
    parent = open_version(version, settings)
    with Storage.open(settings.storage_root).staging() as stage:
        directory = stage / "derived"
        directory.mkdir()
        derived = derive(parent, config, directory, settings)
        made = publish_derived(derived, directory, parent, version, config.name, settings)
    difference, tolerance = (derived.parity[k] for k in ("largest_difference", "tolerance"))
    print(f"registered {made.ref} ({made.digest}), {version.ref} {derived.what}")
    print(f"largest difference from it {difference:.3g}, at most {tolerance:.3g} allowed")
    print(f"deploy it: heliostat deploy {made.name}@{CANDIDATE}")
    result = {
        "name": made.name,
        "version": made.version,
        "digest": made.digest,
        "parity": derived.parity,
    }
    print("result: " + json.dumps(result), flush=True)


def derive(
    parent: ModelPackage, config: ExportConfig, directory: Path, settings: Settings
) -> Derived:
    """Fill `directory` with what the config asks for.

    Raises:
        PackageError: it cannot be made of this parent; ParityError if it is not the same model.
    """
    # Their modules load torch; a check needs none of them.
    if config.to == "merged":
        from jobs.exporting.merging import export_merged

        tolerance = config.relative_tolerance or RELATIVE_TOLERANCES["merge"]
        base = open_base(parent, settings)
        return export_merged(parent, directory, base=base, relative_tolerance=tolerance)
    tolerance = config.relative_tolerance or RELATIVE_TOLERANCES["export"]
    if parent.manifest.kind == "graph":
        from jobs.exporting.graph import export_graph

        return export_graph(parent, directory, opset=config.opset, relative_tolerance=tolerance)
    from jobs.exporting.language_model import export_language_model

    return export_language_model(
        parent, directory, opset=config.opset, relative_tolerance=tolerance
    )


def check(config: ExportConfig, settings: Settings) -> None:
    """There is such a version, of a kind that becomes what is asked for."""
    version = find_version(config, settings)
    print(f"config is valid; would export {version.ref} ({version.kind}) to {config.to}")


def find_version(config: ExportConfig, settings: Settings) -> ModelVersion:
    """Raises NotFoundError for no version, InputError for one of the wrong kind."""
    version = ModelRegistry.open(settings).resolve(ModelRef.parse(config.model))
    if version.kind not in _KINDS[config.to]:
        kinds = " or ".join(_KINDS[config.to])
        hint = "merge it first: to=merged" if version.kind == "adapter" else "name another model"
        raise InputError(
            f"{version.ref} is of kind '{version.kind}'; to={config.to} expects {kinds}",
            hint=hint,
            param="model",
        )
    return version


if __name__ == "__main__":
    run_job(
        ExportConfig,
        verb="export",
        description="Derive an ONNX graph or a merged adapter from a registered version.",
        run=export,
        check=check,
    )
