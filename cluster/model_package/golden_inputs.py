"""Inputs to try a graph with when its author gives none, from its description and a fixed seed.

Knows nothing of packages.

    find_inputs(manifest, runtime.run)   # {"x": array of two samples}
"""

from __future__ import annotations

import math

import numpy as np

from cluster.errors import InputError, PackageError
from cluster.model_package.golden import RunGraph
from cluster.processing import Array, TensorSpec, postprocess, preprocess
from cluster.processing.pipeline import Described

_SEED = 20260101
_NUM_SAMPLES = 2
# Sequence models run at any length; convolutions need room for their kernels and pools.
_FREE_SIZES = (4, 32, 224)
_MAX_VALUES = 1_000_000


def find_inputs(model: Described, run: RunGraph) -> dict[str, Array]:
    """The first made-up inputs that the graph accepts.

    Raises:
        PackageError: it accepts none.
    """
    reason = ""
    for size in _FREE_SIZES:
        specs = model.processing.inputs or model.inputs
        if sum(math.prod(_sizes(spec, size)) for spec in specs) > _MAX_VALUES:
            reason = reason or f"they would have more than {_MAX_VALUES} values"
            break
        inputs = make_inputs(specs, size)
        try:
            postprocess(model, run(preprocess(model, inputs)))
        except InputError as error:
            reason = error.message
        else:
            return inputs
    raise PackageError(
        f"no golden inputs could be made for the graph: {reason}",
        hint="give the writer `golden_inputs`: two typical samples",
    )


def make_inputs(specs: tuple[TensorSpec, ...], free_size: int) -> dict[str, Array]:
    """Two samples by name, each free dimension but the batch of `free_size`."""
    generator = np.random.default_rng(_SEED)
    return {spec.name: _make(spec, free_size, generator) for spec in specs}


def _sizes(spec: TensorSpec, free_size: int) -> list[int]:
    sizes = [free_size if size == -1 else size for size in spec.shape]
    if spec.shape[:1] == (-1,):
        sizes[0] = _NUM_SAMPLES
    return sizes


def _make(spec: TensorSpec, free_size: int, generator: np.random.Generator) -> Array:
    sizes = _sizes(spec, free_size)
    if spec.datatype == "BYTES":
        return np.full(sizes, b"text", dtype=object)
    if spec.datatype.startswith("FP"):
        return np.asarray(generator.random(sizes)).astype(spec.numpy_dtype)
    # Whole numbers are mostly indices and masks: 0 and 1 are in every range.
    return np.asarray(generator.integers(0, 2, sizes)).astype(spec.numpy_dtype)
