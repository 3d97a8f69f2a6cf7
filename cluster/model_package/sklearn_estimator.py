"""A scikit-learn estimator saved with skops becomes an ONNX graph that answers like it.

Only types that skops knows as harmless are loaded; pickles never. The graph's parity certificate is
against the estimator's own `predict` and `predict_proba`.

    converted = convert_estimator(Path("model.skops"), Path("stage/model.onnx"))
    converted.golden_inputs, converted.parity["largest_difference"]
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import JsonValue

from cluster.errors import PackageError
from cluster.model_package.parity import RELATIVE_TOLERANCES, Outputs, certify
from cluster.model_package.sklearn_inputs import EstimatorInputs, describe_inputs, steps
from cluster.model_package.sklearn_trust import load_estimator, one_line
from cluster.processing import Array, Processing, Reshape, TensorSpec

_LABEL, _PROBABILITIES, _PREDICTION = "label", "probabilities", "prediction"


@dataclass(frozen=True)
class ConvertedEstimator:
    """What goes into the package beside the graph."""

    golden_inputs: dict[str, Array]
    processing: Processing
    profile: dict[str, JsonValue]
    """Names of features and classes, in the order of the tensors."""
    parity: dict[str, float]
    notes: tuple[str, ...]
    """For the user."""


def convert_estimator(source: Path, graph: Path) -> ConvertedEstimator:
    """Write the estimator in `source` as an ONNX file.

    Raises:
        ForbiddenFileError: it holds types that are not known to be harmless.
        PackageError: it is no fitted classifier or regressor, or cannot be expressed in ONNX.
        ParityError: the graph answers otherwise than the estimator.
    """
    loaded, notes = load_estimator(source)
    # Of a search, what it found.
    estimator = getattr(loaded, "best_estimator_", loaded)
    task = _task_of(estimator)
    with one_line("what the estimator takes cannot be told", hint="fit it before you save it"):
        inputs = describe_inputs(estimator)
        rows = inputs.make_rows()
        fitted_rows = inputs.as_fitted(rows)
    expected = _answers(estimator, task, fitted_rows)
    _write_graph(estimator, inputs, task, graph)
    parity = _certify(expected, graph, rows)
    notes += (f"largest difference from scikit-learn: {parity['largest_difference']:.2g}",)
    return ConvertedEstimator(
        golden_inputs=rows,
        processing=_processing(expected),
        profile=_profile(estimator, inputs),
        parity=parity,
        notes=(*task.notes, *notes),
    )


@dataclass(frozen=True)
class _Task:
    outputs: tuple[str, ...]
    """What the graph gives, in the order of the converter's outputs."""
    notes: tuple[str, ...] = ()


def _task_of(estimator: Any) -> _Task:
    from sklearn.base import BaseEstimator, is_classifier, is_regressor

    is_estimator = isinstance(estimator, BaseEstimator)
    if is_estimator and is_classifier(estimator):
        if isinstance(getattr(estimator, "classes_", None), list):
            raise PackageError(
                "the classifier predicts several labels at once", hint="import one for each"
            )
        if hasattr(estimator, "predict_proba"):
            return _Task((_LABEL, _PROBABILITIES))
        return _Task((_LABEL,), notes=("it has no predict_proba: its graph gives labels alone",))
    if is_estimator and is_regressor(estimator):
        return _Task((_PREDICTION,))
    raise PackageError(
        f"a {type(estimator).__name__} is neither a classifier nor a regressor",
        hint="import one, or a pipeline that ends with one",
    )


def _write_graph(estimator: Any, inputs: EstimatorInputs, task: _Task, path: Path) -> None:
    with one_line("the estimator cannot be converted to ONNX"), _quiet():
        import onnx
        from skl2onnx import convert_sklearn
        from skl2onnx.common.data_types import FloatTensorType, StringTensorType
        from skl2onnx.helpers.onnx_helper import select_model_inputs_outputs

        types = {"FP32": FloatTensorType, "BYTES": StringTensorType}
        model = convert_sklearn(
            estimator,
            initial_types=[
                (spec.name, types[spec.datatype]([None, spec.shape[1]])) for spec in inputs.specs
            ],
            options=_options(estimator, task),
            final_types=[(name, None) for name in _converter_outputs(task)],
        )
        if len(task.outputs) < len(_converter_outputs(task)):
            model = select_model_inputs_outputs(model, outputs=list(task.outputs))
        _name_inputs(model, inputs.specs)
        onnx.save(model, path)


def _options(estimator: Any, task: _Task) -> dict[int, dict[str, Any]]:
    """The converter's options by the steps they are for."""
    *_, last = all_steps = [*steps(estimator)]
    found: dict[int, dict[str, Any]] = {}
    for step in all_steps:
        if hasattr(step, "vocabulary_"):
            # Its own choice, en_US, is not on every machine.
            found[id(step)] = {"locale": "C.UTF-8"}
    if _PROBABILITIES in task.outputs:
        # An array, in place of a list of dictionaries.
        found[id(last)] = {"zipmap": False}
    return found


def _name_inputs(model: Any, specs: Sequence[TensorSpec]) -> None:
    """The converter replaces what is no letter or digit in a column's name."""
    from onnx import helper

    taken = {value.name for value in model.graph.input}
    for value, spec in zip(model.graph.input, specs, strict=True):
        if value.name != spec.name:
            if spec.name in taken:
                raise PackageError(
                    f"column '{spec.name}' and another one differ only in marks, which the "
                    "converter replaces by '_'",
                    hint="rename one of them and fit the estimator again",
                )
            model.graph.node.insert(0, helper.make_node("Identity", [spec.name], [value.name]))
            value.name = spec.name


def _converter_outputs(task: _Task) -> tuple[str, ...]:
    """A classifier's graph gives scores too, of which not all are probabilities."""
    return (_LABEL, _PROBABILITIES) if task.outputs[0] == _LABEL else task.outputs


def _answers(estimator: Any, task: _Task, rows: Any) -> Outputs:
    """What the estimator itself says, in the graph's names and types."""
    with one_line("the estimator does not predict", hint="fit it before you save it"), _quiet():
        predicted = np.asarray(estimator.predict(rows))
        if task.outputs == (_PREDICTION,):
            return {_PREDICTION: predicted.astype(np.float32).reshape(len(predicted), -1)}
        labels = {_LABEL: _as_bytes(predicted)}
        if _PROBABILITIES not in task.outputs:
            return labels
        return {**labels, _PROBABILITIES: estimator.predict_proba(rows)}


def _certify(expected: Outputs, graph: Path, rows: dict[str, Array]) -> dict[str, float]:
    from cluster.runtimes.onnx import OnnxRuntime

    return certify(
        expected,
        OnnxRuntime(graph).run(rows),
        RELATIVE_TOLERANCES["export"],
        hint="skl2onnx computes this estimator otherwise than scikit-learn; use another",
    )


def _processing(expected: Outputs) -> Processing:
    if _PREDICTION in expected and expected[_PREDICTION].shape[1] == 1:
        # One number per row, as the regressions trained here give it.
        return Processing(post=(Reshape(tensor=_PREDICTION, shape=()),))
    return Processing()


def _profile(estimator: Any, inputs: EstimatorInputs) -> dict[str, JsonValue]:
    found: dict[str, JsonValue] = {}
    if inputs.has_names and inputs.is_joined:
        found["feature_names"] = list(inputs.columns)
    if hasattr(estimator, "classes_"):
        found["class_names"] = [str(name) for name in estimator.classes_]
    return found


def _as_bytes(labels: Array) -> Array:
    if labels.dtype.kind not in "OUS":
        return labels
    return np.array([str(label).encode() for label in labels], dtype=object)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the converter's warnings, which a certificate answers."""
    logging.getLogger("skl2onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
