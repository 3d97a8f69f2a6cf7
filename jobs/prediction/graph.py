"""Graphs: rows become tensors, go through the package's processing and come back as values.

What is sent by name over HTTP is here a column of that name. It knows nothing of files.

    predictor = GraphPredictor(package, config)
    predictor.answer(predictor.prepare(rows))
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from cluster.errors import InputError
from cluster.model_package import ModelPackage
from cluster.processing import (
    Array,
    ImageInput,
    TensorSpec,
    is_batchable,
    postprocess,
    preprocess,
    public_inputs,
    public_outputs,
)
from cluster.runtimes.onnx import OnnxRuntime
from jobs.prediction.config import PredictConfig
from jobs.prediction.predictor import Answer, Prepared
from jobs.prediction.rows import Row, Values


class GraphPredictor:
    """See `jobs.prediction.predictor.Predictor`."""

    def __init__(self, package: ModelPackage, config: PredictConfig) -> None:
        self._manifest = package.manifest
        self._inputs = {spec.name: spec for spec in public_inputs(package.manifest)}
        self._outputs = public_outputs(package.manifest)
        self._columns = config.columns
        self._tokens = config.tokens
        if unknown := sorted(config.columns.keys() - self._inputs.keys()):
            raise InputError(
                f"the model has no input '{unknown[0]}'",
                hint="it takes " + ", ".join(map(str, self._inputs.values())),
                param="columns",
            )
        self._runtime = OnnxRuntime(
            package.graph_path, config.num_threads, use_gpu=config.num_gpus > 0
        )

    def prepare(self, rows: Sequence[Row]) -> list[Prepared | InputError]:
        return [self._try_sample(row.values) for row in rows]

    def answer(self, prepared: Sequence[Prepared]) -> list[Answer | InputError]:
        found = self._answer([each.work for each in prepared])
        return [
            replace(answer, prompt_tokens=each.max_tokens) if isinstance(answer, Answer) else answer
            for answer, each in zip(found, prepared, strict=True)
        ]

    def _try_sample(self, values: Values) -> Prepared | InputError:
        try:
            return Prepared(self._sample(values), self._num_tokens(values))
        except InputError as error:
            return error

    def _num_tokens(self, values: Values) -> int:
        """What the row is charged."""
        num_tokens = values.get(self._tokens) if self._tokens else 0
        if type(num_tokens) is not int or num_tokens < 0:
            raise InputError(f"column '{self._tokens}' is no number of tokens", param="tokens")
        return num_tokens

    def _sample(self, values: Values) -> dict[str, Array]:
        """A row's tensors, without the batch dimension."""
        found: dict[str, Array] = {}
        for name, spec in self._inputs.items():
            value = values.get(self._columns.get(name, name))
            if value is not None:
                found[name] = self._element(spec, value)
        if not found:
            raise InputError(
                f"the row has none of the model's inputs: {', '.join(self._inputs)}",
                hint="name its columns in `columns`",
            )
        return found

    def _element(self, spec: TensorSpec, value: Any) -> Array:
        shape = spec.shape[1:]
        if spec.datatype == "BYTES":
            is_image = isinstance(self._manifest.processing.raw_inputs.get(spec.name), ImageInput)
            flat = np.array(_flat(value), dtype=object)
            array = np.empty(len(flat), dtype=object)
            array[:] = [_to_bytes(spec.name, each, is_base64=is_image) for each in flat]
        else:
            array = _numbers(spec, value)
        if -1 in shape:
            return array
        if array.size != math.prod(shape):
            raise InputError(
                f"input '{spec.name}' has {array.size} values, expected {math.prod(shape)} ({spec})"
            )
        return array.reshape(shape)

    def _answer(self, samples: Sequence[dict[str, Array]]) -> list[Answer | InputError]:
        """Together where they go together; one by one where a row spoils it for the others."""
        if len(samples) > 1 and is_batchable(self._manifest) and _alike(samples):
            try:
                return self._run(samples)
            except InputError:
                pass
        return [self._run_alone(sample) for sample in samples]

    def _run_alone(self, sample: dict[str, Array]) -> Answer | InputError:
        try:
            return self._run([sample])[0]
        except InputError as error:
            return error

    def _run(self, samples: Sequence[dict[str, Array]]) -> list[Answer | InputError]:
        inputs = {name: np.stack([s[name] for s in samples]) for name in samples[0]}
        raw = self._runtime.run(preprocess(self._manifest, inputs))
        outputs = postprocess(self._manifest, raw)
        if len(samples) == 1 and not is_batchable(self._manifest):
            return [
                self._to_answer({n: a[0, ...] if len(a) == 1 else a for n, a in outputs.items()})
            ]
        return [
            self._to_answer({name: array[i, ...] for name, array in outputs.items()})
            for i in range(len(samples))
        ]

    def _to_answer(self, outputs: Mapping[str, Array]) -> Answer | InputError:
        values: Values = {}
        for spec in self._outputs:
            value = outputs[spec.name]
            if spec.datatype == "BYTES":
                values[spec.name] = _to_text(value.tolist() if value.ndim else value.item())
            elif np.isfinite(value).all():
                values[spec.name] = value.tolist()
            else:
                return InputError(f"output '{spec.name}' holds NaN or infinity")
        return Answer(values)


def _alike(samples: Sequence[dict[str, Array]]) -> bool:
    shapes = [{name: array.shape for name, array in sample.items()} for sample in samples]
    return all(shape == shapes[0] for shape in shapes)


def _numbers(spec: TensorSpec, value: Any) -> Array:
    try:
        found = np.asarray(value)
        if found.dtype.kind not in "biuf":
            raise ValueError
        with np.errstate(over="ignore", invalid="ignore"):  # infinity is refused with NaN
            array: Array = found.astype(spec.numpy_dtype)
        if spec.numpy_dtype.kind != "f" and not np.array_equal(array, found):
            raise ValueError
    except (ValueError, OverflowError, TypeError):
        raise InputError(
            f"input '{spec.name}' holds values that are no {spec.datatype}", param=spec.name
        ) from None
    return array


def _flat(value: Any) -> list[Any]:
    if not isinstance(value, list):
        return [value]
    return [each for part in value for each in _flat(part)]


def _to_bytes(name: str, value: Any, *, is_base64: bool) -> bytes:
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise InputError(f"input '{name}' is BYTES, expected text", param=name)
    try:
        return base64.b64decode(value, validate=True) if is_base64 else value.encode()
    except (binascii.Error, ValueError):
        raise InputError(
            f"input '{name}' is not base64 text", hint="encode the file's bytes", param=name
        ) from None


def _to_text(value: Any) -> Any:
    if isinstance(value, list):
        return [_to_text(each) for each in value]
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value)
