"""What each processing step does to arrays, and what it does to their descriptions.

Two tables keyed by the step's class; nothing here knows where arrays come from.

    apply_step(Softmax(tensor="logits"), {"logits": scores_BC})
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from cluster.errors import PackageError
from cluster.processing.specification import (
    Cast,
    Labels,
    PostStep,
    PreStep,
    Rename,
    Reshape,
    Scale,
    Softmax,
    Standardize,
)
from cluster.processing.tensors import Array, TensorSpec

Step = PreStep | PostStep
Arrays = dict[str, Array]
Specs = dict[str, TensorSpec]


def apply_step(step: Step, arrays: Arrays) -> Arrays:
    """The arrays after `step`; the input dictionary is left as it is."""
    return _APPLY[type(step)](step, dict(arrays))


def describe_step(step: Step, specs: Specs) -> Specs:
    """The descriptions after `step`.

    Raises:
        PackageError: the step cannot work on what stands before it.
    """
    if step.tensor not in specs:
        raise PackageError(
            f"processing step '{step.op}' names tensor '{step.tensor}', "
            f"there are: {', '.join(specs) or 'none'}",
            hint="correct the step's `tensor`",
        )
    return _DESCRIBE[type(step)](step, dict(specs))


def _scale(step: Scale, arrays: Arrays) -> Arrays:
    x = arrays[step.tensor]
    arrays[step.tensor] = (x * step.factor + step.offset).astype(x.dtype, copy=False)
    return arrays


def _standardize(step: Standardize, arrays: Arrays) -> Arrays:
    x = arrays[step.tensor]
    shape = [1] * x.ndim
    shape[step.axis] = len(step.mean)
    mean = np.asarray(step.mean).reshape(shape)
    std = np.asarray(step.std).reshape(shape)
    arrays[step.tensor] = ((x - mean) / std).astype(x.dtype, copy=False)
    return arrays


def _reshape(step: Reshape, arrays: Arrays) -> Arrays:
    x = arrays[step.tensor]
    arrays[step.tensor] = x.reshape(x.shape[0], *step.shape)
    return arrays


def _cast(step: Cast, arrays: Arrays) -> Arrays:
    dtype = TensorSpec(name=step.tensor, datatype=step.datatype, shape=()).numpy_dtype
    arrays[step.tensor] = arrays[step.tensor].astype(dtype)
    return arrays


def _softmax(step: Softmax, arrays: Arrays) -> Arrays:
    x = arrays[step.tensor]
    # In at least 32 bits: exponentials of 16-bit scores overflow.
    wide = x.astype(np.promote_types(x.dtype, np.float32), copy=False)
    powers = np.exp(wide - wide.max(axis=-1, keepdims=True))
    result = powers / powers.sum(axis=-1, keepdims=True)
    arrays[step.into or step.tensor] = result.astype(x.dtype, copy=False)
    return arrays


def _labels(step: Labels, arrays: Arrays) -> Arrays:
    names = np.array([label.encode() for label in step.labels], dtype=object)
    arrays[step.into] = names[arrays[step.tensor].argmax(axis=-1)]
    return arrays


def _rename(step: Rename, arrays: Arrays) -> Arrays:
    return {step.into if name == step.tensor else name: x for name, x in arrays.items()}


_APPLY: dict[type[Any], Callable[[Any, Arrays], Arrays]] = {
    Scale: _scale,
    Standardize: _standardize,
    Reshape: _reshape,
    Cast: _cast,
    Softmax: _softmax,
    Labels: _labels,
    Rename: _rename,
}


def _describe_scale(step: Scale, specs: Specs) -> Specs:
    _require_floats(step, specs[step.tensor])
    return specs


def _describe_standardize(step: Standardize, specs: Specs) -> Specs:
    spec = specs[step.tensor]
    _require_floats(step, spec)
    if not -len(spec.shape) <= step.axis < len(spec.shape):
        raise _misfit(step, spec, f"axis {step.axis} does not exist")
    if spec.shape[step.axis] not in (-1, len(step.mean)):
        raise _misfit(step, spec, f"it has {len(step.mean)} means")
    return specs


def _describe_reshape(step: Reshape, specs: Specs) -> Specs:
    spec = specs[step.tensor]
    if not spec.shape:
        raise _misfit(step, spec, "a scalar has no batch dimension")
    if -1 not in spec.shape[1:] and math.prod(spec.shape[1:]) != math.prod(step.shape):
        raise _misfit(step, spec, f"a sample does not fit into {list(step.shape)}")
    specs[step.tensor] = spec.model_copy(update={"shape": (spec.shape[0], *step.shape)})
    return specs


def _describe_cast(step: Cast, specs: Specs) -> Specs:
    spec = specs[step.tensor]
    if "BYTES" in (spec.datatype, step.datatype):
        raise _misfit(step, spec, f"cannot become {step.datatype}")
    specs[step.tensor] = spec.model_copy(update={"datatype": step.datatype})
    return specs


def _describe_softmax(step: Softmax, specs: Specs) -> Specs:
    spec = specs[step.tensor]
    _require_floats(step, spec)
    if not spec.shape:
        raise _misfit(step, spec, "a scalar has no axis")
    return _with(step, specs, spec.model_copy(update={"name": step.into or step.tensor}))


def _describe_labels(step: Labels, specs: Specs) -> Specs:
    spec = specs[step.tensor]
    if not spec.shape or spec.datatype == "BYTES":
        raise _misfit(step, spec, "it has no scores")
    if spec.shape[-1] not in (-1, len(step.labels)):
        raise _misfit(step, spec, f"there are {len(step.labels)} labels")
    return _with(step, specs, TensorSpec(name=step.into, datatype="BYTES", shape=spec.shape[:-1]))


def _describe_rename(step: Rename, specs: Specs) -> Specs:
    renamed = specs[step.tensor].model_copy(update={"name": step.into})
    _with(step, dict(specs), renamed)
    return {s.name: s for s in (renamed if s.name == step.tensor else s for s in specs.values())}


_DESCRIBE: dict[type[Any], Callable[[Any, Specs], Specs]] = {
    Scale: _describe_scale,
    Standardize: _describe_standardize,
    Reshape: _describe_reshape,
    Cast: _describe_cast,
    Softmax: _describe_softmax,
    Labels: _describe_labels,
    Rename: _describe_rename,
}


def _with(step: Step, specs: Specs, added: TensorSpec) -> Specs:
    if added.name in specs and added.name != step.tensor:
        raise PackageError(
            f"processing step '{step.op}' writes tensor '{added.name}', which exists already",
            hint="choose another `into`",
        )
    specs[added.name] = added
    return specs


def _require_floats(step: Step, spec: TensorSpec) -> None:
    if not spec.datatype.startswith("FP"):
        raise _misfit(step, spec, "it works on floating-point tensors; cast first")


def _misfit(step: Step, spec: TensorSpec, why: str) -> PackageError:
    return PackageError(
        f"processing step '{step.op}' does not fit tensor '{spec}': {why}",
        hint="correct the package's processing",
    )
