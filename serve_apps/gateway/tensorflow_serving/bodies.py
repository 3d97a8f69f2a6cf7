"""The bodies of TensorFlow Serving's predictions: by rows (`instances`) or by columns (`inputs`).

    asked = read_predict(body, model)
    values = write_predict(asked, model, outputs)

Rows of one input need no name, and neither has a lone output. Bytes travel as `{"b64": "…"}`; a
plain string is its UTF-8. A lone value stands for a sample that holds one.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from cluster.errors import InputError
from cluster.processing import Array, TensorSpec, public_inputs, public_outputs
from serve_apps.gateway.backend import Arrays
from serve_apps.gateway.catalogue import ServedModel
from serve_apps.gateway.http.requests import parse_object, validate
from serve_apps.gateway.tensors import check_finite, declare, from_values

SIGNATURE = "serving_default"
_B64 = "b64"


class PredictBody(BaseModel):
    """What a prediction is asked with: one of `instances` and `inputs`."""

    model_config = ConfigDict(extra="forbid")

    signature_name: str = SIGNATURE
    instances: list[Any] | None = Field(None, min_length=1)
    inputs: Any = None


@dataclass(frozen=True)
class PredictRequest:
    """A prediction that is asked for."""

    inputs: Arrays
    num_rows: int | None
    """None where the answer goes by columns."""


def read_predict(body: bytes, model: ServedModel) -> PredictRequest:
    """A request with its tensors as arrays.

    Raises:
        InputError: `param` names the input or the field at fault.
    """
    asked = validate(PredictBody, parse_object(body))
    if asked.signature_name not in ("", SIGNATURE):
        raise InputError(
            f"there is no signature '{asked.signature_name:.100}'",
            hint=f"leave 'signature_name' out, or send '{SIGNATURE}'",
            param="signature_name",
        )
    if (asked.instances is None) == (asked.inputs is None):
        raise InputError(
            "one of 'instances' and 'inputs' is expected",
            hint="send rows in 'instances', or columns in 'inputs'",
            param="instances",
        )
    raw_names = set(model.manifest.processing.raw_inputs)
    specs = {spec.name: spec for spec in public_inputs(model.manifest)}
    if asked.instances is None:
        columns = _named(asked.inputs, specs, raw_names)
        return PredictRequest(_to_arrays(columns, specs), None)
    columns = _columns(asked.instances, specs, raw_names)
    return PredictRequest(_to_arrays(columns, specs), len(asked.instances))


def write_predict(asked: PredictRequest, model: ServedModel, outputs: Arrays) -> dict[str, Any]:
    """The body of an answer.

    Raises:
        InputError: an output does not go by rows, as was asked for.
        UpstreamFailedError: an output holds NaN or infinity.
    """
    specs = public_outputs(model.manifest)
    columns = {spec.name: _to_json(spec, outputs[spec.name]) for spec in specs}
    if asked.num_rows is None:
        return {"outputs": _unnamed_if_single(columns)}
    for spec in specs:
        if outputs[spec.name].shape[:1] != (asked.num_rows,):
            raise InputError(
                f"output '{spec.name}' has shape {list(outputs[spec.name].shape)} for "
                f"{asked.num_rows} instances",
                hint="send 'inputs' instead, which is answered by columns",
                param="instances",
            )
    if len(columns) == 1:
        return {"predictions": _unnamed_if_single(columns)}
    rows = zip(*columns.values(), strict=True)
    return {"predictions": [dict(zip(columns, row, strict=True)) for row in rows]}


def _columns(
    instances: Sequence[Any], specs: Mapping[str, TensorSpec], raw_names: set[str]
) -> dict[str, Any]:
    """Rows, each a value or an object of them by name, as columns."""
    if not _has_names(instances[0]):
        return _named(list(instances), specs, raw_names)
    names = instances[0].keys()
    for index, instance in enumerate(instances):
        if not isinstance(instance, dict) or instance.keys() != names:
            raise InputError(
                f"instance {index} has not the inputs of instance 0: {', '.join(names):.200}",
                hint="send the same in each",
                param="instances",
            )
    return {name: [instance[name] for instance in instances] for name in names}


def _named(value: Any, specs: Mapping[str, TensorSpec], raw_names: set[str]) -> dict[str, Any]:
    """Columns by name; what has no name is the only input that it can be."""
    if _has_names(value):
        named: dict[str, Any] = value
        return named
    is_file = _is_b64(_first_leaf(value))
    fitting = [
        name
        for name, spec in specs.items()
        if (spec.datatype == "BYTES" if is_file else name not in raw_names)
    ]
    if len(fitting) != 1:
        known = ", ".join(str(spec) for spec in specs.values())
        raise InputError(
            "the values have no name, and could be those of several inputs or of none",
            hint=f"send an object of inputs by name: {known}",
            param="instances",
        )
    return {fitting[0]: value}


def _to_arrays(columns: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> Arrays:
    arrays: Arrays = {}
    for name, column in columns.items():
        spec = specs.get(name)
        if spec is None:
            known = ", ".join(str(spec) for spec in specs.values())
            raise InputError(f"unknown input '{name:.200}'", hint=f"expected {known}", param=name)
        array = _texts(spec, column) if spec.datatype == "BYTES" else _numbers(spec, column)
        if array.ndim == len(spec.shape) - 1 and spec.shape[-1] == 1:
            array = array[..., np.newaxis]
        arrays[name] = array
    return arrays


def _numbers(spec: TensorSpec, column: Any) -> Array:
    shape: list[int] = []
    level = column
    while isinstance(level, list):
        shape.append(len(level))
        level = level[0] if level else None
    return from_values(declare(spec.name, spec.datatype, shape), column)


def _texts(spec: TensorSpec, column: Any) -> Array:
    try:
        values = np.asarray(column, dtype=object)
    except ValueError:
        values = np.empty(0, dtype=object)
    declare(spec.name, spec.datatype, values.shape)
    texts = np.empty(values.shape, dtype=object)
    for index, value in np.ndenumerate(values):
        texts[index] = _to_bytes(spec.name, value)
    return texts


def _to_bytes(name: str, value: Any) -> bytes:
    if isinstance(value, str):
        return value.encode()
    if _is_b64(value) and isinstance(value[_B64], str):
        try:
            return base64.b64decode(value[_B64], validate=True)
        except (binascii.Error, ValueError):
            raise InputError(
                f"input '{name}' holds an object 'b64' that is not base64 text",
                hint="encode the file's bytes, e.g. with `base64 -w0 FILE`",
                param=name,
            ) from None
    raise InputError(
        f"input '{name}' is BYTES, expected strings in lists of equal length",
        hint='send a string, or bytes as {"b64": "…"}',
        param=name,
    )


def _to_json(spec: TensorSpec, array: Array) -> Any:
    if spec.datatype != "BYTES":
        check_finite(spec, array)
        if array.ndim == 0:
            return array[()]
        return np.ascontiguousarray(array, dtype=spec.numpy_dtype)
    texts = np.empty(array.shape, dtype=object)
    for index, value in np.ndenumerate(array):
        texts[index] = _to_text(value)
    return texts.tolist()


def _to_text(value: bytes) -> Any:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return {_B64: base64.b64encode(value).decode()}


def _unnamed_if_single(columns: Mapping[str, Any]) -> Any:
    return next(iter(columns.values())) if len(columns) == 1 else columns


def _has_names(value: Any) -> bool:
    return isinstance(value, dict) and not _is_b64(value)


def _is_b64(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {_B64}


def _first_leaf(value: Any) -> Any:
    while isinstance(value, list) and value:
        value = value[0]
    return value
