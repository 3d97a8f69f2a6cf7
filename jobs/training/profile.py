"""The profile of training data that goes into a package, to notice drift later.

profile = data_profile(dataset, exported)
profile["columns"]           # {'pixels': {'mean': …, 'std': …, 'min': …, 'max': …}, …}
profile["distributions"]     # what serving compares its inputs and outputs with
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.processing import (
    Processing,
    TensorSpec,
    postprocess,
    preprocess,
    public_inputs,
)
from cluster.statistics.features import LENGTH, TOKENS, input_features, output_features
from cluster.statistics.profile import (
    DISTRIBUTIONS,
    DataProfile,
    Feature,
    describe,
    describe_tokens,
)
from jobs.data.dataset import DOCUMENT_STARTS, LOSS_MASK, Dataset
from jobs.data.dataset import TOKENS as TOKEN_IDS
from jobs.data.rows import Array
from jobs.data.table_info import FEATURES
from jobs.models.family import Exported

_MAX_ROWS = 10_000
_MAX_TEXT_ROWS = 2_000
_BATCH_ROWS = 256


def data_profile(dataset: Dataset, exported: Exported) -> dict[str, Any]:
    """Size and digest of the dataset, simple statistics of numeric columns, and distributions.

    Args:
        exported: the model, whose answers to the validation split are a part of it.
    """
    info = dataset.info
    profile: dict[str, Any] = {"dataset": info.name, "num_rows": dict(info.num_rows)}
    if info.text is not None:
        profile["unigram_entropy"] = info.text.unigram_entropy
        profile["num_tokens"] = dict(info.text.num_tokens)
        profile[DISTRIBUTIONS] = _text_distributions(dataset).model_dump(mode="json")
        return profile
    if info.table is not None:
        # The order in which clients send features; objects in a manifest have none.
        profile["feature_names"] = list(info.table.feature_names)
        profile["target_name"] = info.table.target_name
        profile["class_names"] = list(info.class_names)
    sample = _first_rows(dataset, "train", _MAX_ROWS)
    if info.table is not None:
        sample.update(zip(info.table.feature_names, sample.pop(FEATURES).T, strict=True))
    profile["columns"] = {name: _statistics(values) for name, values in sample.items()}
    if exported.kind == "graph":
        profile[DISTRIBUTIONS] = _graph_distributions(dataset, exported).model_dump(mode="json")
    return profile


def _statistics(values: Array) -> dict[str, float]:
    return {
        "mean": float(values.mean(dtype=np.float64)),
        "std": float(values.std(dtype=np.float64)),
        "min": float(values.min()),
        "max": float(values.max()),
    }


@dataclass(frozen=True)
class _Graph:
    """An exported graph, as processing sees it."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    processing: Processing


def _graph_distributions(dataset: Dataset, exported: Exported) -> DataProfile:
    """What the graph takes of the train split, and what a client gets for the validation split."""
    from cluster.runtimes.onnx import OnnxRuntime

    runtime = OnnxRuntime(exported.directory / "model.onnx")
    graph = _Graph(runtime.inputs, runtime.outputs, exported.processing)
    names = dataset.info.table.feature_names if dataset.info.table else ()
    taken = preprocess(graph, _as_sent(graph, _first_rows(dataset, "train", _MAX_ROWS)))
    answers: list[dict[str, Array]] = []
    held_out = _as_sent(graph, _first_rows(dataset, "validation", _MAX_ROWS))
    num_rows = min(map(len, held_out.values()), default=0)
    for start in range(0, num_rows, _BATCH_ROWS):
        batch = {name: rows[start : start + _BATCH_ROWS] for name, rows in held_out.items()}
        answers.append(postprocess(graph, runtime.run(preprocess(graph, batch))))
    joined = {name: np.concatenate([a[name] for a in answers]) for name in (answers or [{}])[0]}
    return DataProfile(
        inputs=describe(input_features(taken, names)), outputs=describe(output_features(joined))
    )


def _as_sent(graph: _Graph, columns: dict[str, Array]) -> dict[str, Array]:
    """Columns in the shape and type that clients send."""
    raw = graph.processing.raw_inputs
    specs = [spec for spec in public_inputs(graph) if spec.name not in raw]
    return {
        spec.name: columns[spec.name]
        .reshape((len(columns[spec.name]), *spec.shape[1:]))
        .astype(spec.numpy_dtype)
        for spec in specs
    }


def _text_distributions(dataset: Dataset) -> DataProfile:
    columns = _first_rows(dataset, "train", _MAX_TEXT_ROWS)
    pad_id = dataset.text.pad_id
    kept = kept_tokens(columns, pad_id)
    inputs: dict[str, Feature] = {
        **describe({LENGTH: document_lengths(columns, kept)}),
        TOKENS: describe_tokens(columns[TOKEN_IDS][kept]),
    }
    held_out = _first_rows(dataset, "validation", _MAX_TEXT_ROWS)
    outputs: dict[str, Feature] = {}
    if len(held_out[TOKEN_IDS]):
        predicted = kept_tokens(held_out, pad_id)
        if LOSS_MASK in held_out:
            predicted &= _bits(held_out[LOSS_MASK], predicted.shape[1])
        outputs[TOKENS] = describe_tokens(held_out[TOKEN_IDS][predicted])
    return DataProfile(inputs=inputs, outputs=outputs)


def kept_tokens(columns: dict[str, Array], pad_id: int) -> Array:
    """Which tokens count: without those that two rows share, and those that fill rows up."""
    tokens = columns[TOKEN_IDS]
    kept = np.ones(tokens.shape, dtype=bool)
    if LOSS_MASK in columns:
        # Conversations are put whole into rows of their own.
        is_padding = tokens == pad_id
        kept = ~np.logical_and.accumulate(is_padding[:, ::-1], axis=1)[:, ::-1]
    else:
        kept[:, -1] = False
    return kept


def document_lengths(columns: dict[str, Array], kept: Array) -> Array:
    """In tokens, of the documents that begin within the rows."""
    starts = _bits(columns[DOCUMENT_STARTS], kept.shape[1])
    begins = np.flatnonzero(starts[kept])
    return np.diff(np.append(begins, kept.sum())) if len(begins) else np.array([int(kept.sum())])


def _bits(packed: Array, count: int) -> Array:
    return np.unpackbits(packed, axis=1, count=count).astype(bool)


def _first_rows(dataset: Dataset, split: str, most: int) -> dict[str, Array]:
    rows = dataset.rows(split)
    return rows.read(np.arange(min(most, len(rows))))
