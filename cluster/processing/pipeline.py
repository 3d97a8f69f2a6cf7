"""From a client's arrays to the graph's and back, checked against what the model declares.

Knows nothing of HTTP; errors name the input at fault in `param`.

    arrays = preprocess(manifest, {"pixels": pixels_BF})
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from cluster.errors import InputError, PackageError
from cluster.processing.specification import Processing, RawInput
from cluster.processing.steps import Arrays, Specs, apply_step, describe_step
from cluster.processing.tensors import Array, TensorSpec, datatype_of


class Described(Protocol):
    """What processing must know of a model; a package's manifest is one."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]: ...

    @property
    def processing(self) -> Processing: ...


def public_inputs(model: Described) -> list[TensorSpec]:
    """What a client may send: the tensors, then the raw inputs that can stand for one of them."""
    raw = (TensorSpec(name=n, datatype="BYTES", shape=(-1,)) for n in model.processing.raw_inputs)
    return [*_tensors_sent(model), *raw]


def public_outputs(model: Described) -> list[TensorSpec]:
    """What a client gets."""
    specs: Specs = {spec.name: spec for spec in model.outputs}
    for step in model.processing.post:
        specs = describe_step(step, specs)
    return list(specs.values())


def is_batchable(model: Described) -> bool:
    """Whether samples of several requests may be joined along the first dimension."""
    specs = (*_tensors_sent(model), *model.inputs, *model.outputs, *public_outputs(model))
    return all(spec.shape[:1] == (-1,) for spec in specs)


def check_processing(model: Described) -> None:
    """Refuse processing that cannot lead from its inputs to the graph's, or back.

    Raises:
        PackageError: naming the step or the tensor.
    """
    specs: Specs = {spec.name: spec for spec in _tensors_sent(model)}
    for name, raw in model.processing.raw_inputs.items():
        _check_raw_input(name, raw, specs)
    for step in model.processing.pre:
        specs = describe_step(step, specs)
    for wanted in model.inputs:
        if (found := specs.get(wanted.name)) is None or not _fits(found, wanted):
            raise PackageError(
                f"the graph takes '{wanted}', pre-processing gives '{found or 'nothing'}'",
                hint="correct `processing.inputs` or `processing.pre`",
            )
    public_outputs(model)


def preprocess(model: Described, inputs: Mapping[str, Array]) -> Arrays:
    """What the graph takes, from what a client sent; raw inputs are object arrays of `bytes`.

    Raises:
        InputError: a wrong name, type, shape or value; `param` names the input.
    """
    arrays = _resolve_raw(model, inputs)
    specs = _tensors_sent(model)
    for spec in specs:
        if spec.name not in arrays:
            raise _missing(model, spec)
        check_array(spec, arrays[spec.name])
    _check_same_batch(specs, arrays)
    for step in model.processing.pre:
        arrays = apply_step(step, arrays)
    return {spec.name: arrays[spec.name] for spec in model.inputs}


def postprocess(model: Described, outputs: Mapping[str, Array]) -> Arrays:
    """What a client gets, from what the graph gave."""
    arrays = dict(outputs)
    for step in model.processing.post:
        arrays = apply_step(step, arrays)
    return arrays


def check_array(spec: TensorSpec, array: Array) -> None:
    """Raises InputError unless `array` is what `spec` declares, with finite numbers."""
    datatype = datatype_of(array)
    if datatype != spec.datatype:
        raise _bad_input(spec, f"has datatype {datatype or array.dtype}")
    fits = array.ndim == len(spec.shape) and all(
        size == wanted or (wanted == -1 and size > 0)
        for size, wanted in zip(array.shape, spec.shape, strict=True)
    )
    if not fits:
        raise _bad_input(spec, f"has shape {list(array.shape)}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise _bad_input(spec, "holds NaN or infinity")


def _tensors_sent(model: Described) -> tuple[TensorSpec, ...]:
    return model.processing.inputs or model.inputs


def _resolve_raw(model: Described, inputs: Mapping[str, Array]) -> Arrays:
    raw_inputs = model.processing.raw_inputs
    specs = {spec.name: spec for spec in _tensors_sent(model)}
    arrays: Arrays = {}
    for name, array in inputs.items():
        target = raw_inputs[name].target if name in raw_inputs else name
        if target not in specs:
            known = ", ".join(str(spec) for spec in public_inputs(model))
            raise InputError(f"unknown input '{name}'", hint=f"expected {known}", param=name)
        if target in arrays:
            raise InputError(
                f"input '{name}' and another input both stand for '{target}'",
                hint="send one of them",
                param=name,
            )
        arrays[target] = (
            _decode(name, raw_inputs[name], array, specs[target]) if name in raw_inputs else array
        )
    return arrays


def _decode(name: str, raw: RawInput, array: Array, target: TensorSpec) -> Array:
    from cluster.processing.images import decode_image

    files = array.reshape(-1) if array.ndim == 2 and array.shape[1] == 1 else array
    check_array(TensorSpec(name=name, datatype="BYTES", shape=(-1,)), files)
    rows = []
    for data in files:
        if not isinstance(data, bytes):
            raise InputError(
                f"input '{name}' holds {type(data).__name__}, expected bytes",
                hint="send the bytes of image files",
                param=name,
            )
        rows.append(decode_image(data, raw, param=name))
    return np.stack(rows).astype(target.numpy_dtype).reshape(len(rows), *target.shape[1:])


def _check_raw_input(name: str, raw: RawInput, specs: Specs) -> None:
    target = specs.get(raw.target)
    values = raw.width * raw.height * (3 if raw.mode == "RGB" else 1)
    if (
        name in specs
        or target is None
        or target.datatype == "BYTES"
        or target.shape[:1] != (-1,)
        or -1 in target.shape[1:]
        or math.prod(target.shape[1:]) != values
    ):
        raise PackageError(
            f"raw input '{name}' gives {values} values for '{target or raw.target}'",
            hint="its target must be another input, [any, …], with as many values a sample",
        )


def _check_same_batch(specs: tuple[TensorSpec, ...], arrays: Arrays) -> None:
    batched = [spec for spec in specs if spec.shape[:1] == (-1,)]
    sizes = {spec.name: arrays[spec.name].shape[0] for spec in batched}
    if len(set(sizes.values())) > 1:
        shown = ", ".join(f"'{name}' {size}" for name, size in sizes.items())
        raise InputError(
            f"inputs have different numbers of samples: {shown}",
            hint="send the same number in each",
            param=batched[-1].name,
        )


def _missing(model: Described, spec: TensorSpec) -> InputError:
    raw = [name for name, raw in model.processing.raw_inputs.items() if raw.target == spec.name]
    instead = f", or {' or '.join(repr(name) for name in raw)} instead" if raw else ""
    return InputError(
        f"input '{spec.name}' is missing", hint=f"send '{spec}'{instead}", param=spec.name
    )


def _bad_input(spec: TensorSpec, found: str) -> InputError:
    return InputError(f"input '{spec.name}' {found}", hint=f"expected '{spec}'", param=spec.name)


def _fits(found: TensorSpec, wanted: TensorSpec) -> bool:
    return (
        found.datatype == wanted.datatype
        and len(found.shape) == len(wanted.shape)
        and all(-1 in (a, b) or a == b for a, b in zip(found.shape, wanted.shape, strict=True))
    )
