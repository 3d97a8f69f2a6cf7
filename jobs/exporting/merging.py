"""An adapter and its base become a whole language model, that any reader can serve.

derived = export_merged(package, directory, base=open_base(package, settings))
"""

from __future__ import annotations

from pathlib import Path

from cluster.model_package import ModelPackage
from cluster.model_package.adapter import merge_into
from cluster.model_package.parity import golden_texts
from cluster.processing import Processing
from jobs.exporting.derived import Derived


def export_merged(
    parent: ModelPackage, directory: Path, *, base: ModelPackage, relative_tolerance: float
) -> Derived:
    """Write the whole model to `directory`.

    Raises:
        ParityError: it answers otherwise than the adapter on its base.
    """
    prompts = golden_texts(parent)
    parity = merge_into(directory, base.model_dir, parent.model_dir, prompts, relative_tolerance)
    return Derived("language_model", parity, prompts, Processing(), what="merged into its base")
