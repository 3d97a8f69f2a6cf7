"""What a fitted scikit-learn estimator takes, read off its fitted steps, and rows to try it with.

An array, or a frame whose columns all hold numbers, is one tensor `features`; a frame whose columns
are treated apart (a `ColumnTransformer`) is one tensor per column; documents are one tensor `text`.
Knows nothing of ONNX.

    described = describe_inputs(estimator)
    rows = described.make_rows()               # {"age": [[38.2], …], "city": [[b"Bern"], …]}
    estimator.predict(described.as_fitted(rows))
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.errors import PackageError
from cluster.processing import Array, TensorSpec

FEATURES, TEXT = "features", "text"

_NUM_ROWS = 16
_SEED = 20260101
_WORDS_PER_TEXT = 6
# The golden rows of more would not fit into a manifest.
_MAX_FEATURES = 100_000
# Nobody knows the units of a column that was not scaled.
_MAGNITUDES = (1.0, 10.0, 100.0)


@dataclass(frozen=True)
class Column:
    """One column that the estimator was fitted on."""

    low: float | None = None
    high: float | None = None
    """Where numbers are worth trying: around what it saw; None if its fitted steps do not tell."""
    categories: tuple[Any, ...] = ()
    """What it saw, of a column of categories."""
    is_text: bool = False
    is_used: bool = True

    def make(self, generator: np.random.Generator) -> Array:
        """Values to try, [N, 1]: fp32 or UTF-8."""
        if self.is_text:
            values = [str(value).encode() for value in generator.choice(self.categories, _NUM_ROWS)]
            return np.array(values, dtype=object).reshape(-1, 1)
        if self.categories:
            numbers = generator.choice(np.array(self.categories, np.float64), _NUM_ROWS)
        elif self.low is None or self.high is None:
            numbers = generator.uniform(-2, 2, _NUM_ROWS) * np.resize(_MAGNITUDES, _NUM_ROWS)
        else:
            numbers = generator.uniform(self.low, self.high, _NUM_ROWS)
        return numbers.astype(np.float32).reshape(-1, 1)


@dataclass(frozen=True)
class EstimatorInputs:
    """The tensors, and how they stand for what the estimator was fitted on."""

    columns: Mapping[str, Column]
    """By name if it was fitted on a frame, else by number; in order."""
    is_joined: bool
    """Whether all columns are one tensor."""
    has_names: bool
    vocabulary: tuple[str, ...] = ()
    """Of an estimator of documents."""

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """The graph's inputs."""
        if self.vocabulary:
            return (TensorSpec(name=TEXT, datatype="BYTES", shape=(-1, 1)),)
        if self.is_joined:
            is_text = any(column.is_text for column in self.columns.values())
            shape = (-1, len(self.columns))
            return (
                TensorSpec(name=FEATURES, datatype="BYTES" if is_text else "FP32", shape=shape),
            )
        return tuple(
            TensorSpec(name=name, datatype="BYTES" if column.is_text else "FP32", shape=(-1, 1))
            for name, column in self.columns.items()
            if column.is_used
        )

    def make_rows(self) -> dict[str, Array]:
        """The same few rows every time, as clients send them."""
        generator = np.random.default_rng(_SEED)
        if self.vocabulary:
            words = generator.choice(self.vocabulary, (_NUM_ROWS, _WORDS_PER_TEXT))
            # Cases, marks and numbers, on which tokenizers differ.
            texts = [f"{' '.join(row).title()}, a {row[0]}; 7 {row[1]}!".encode() for row in words]
            return {TEXT: np.array(texts, dtype=object).reshape(-1, 1)}
        made = {n: column.make(generator) for n, column in self.columns.items() if column.is_used}
        return {FEATURES: np.hstack([*made.values()])} if self.is_joined else made

    def as_fitted(self, rows: Mapping[str, Array]) -> Any:
        """The same rows as a frame, an array or a list, whichever the estimator was fitted on."""
        if self.vocabulary:
            return [text.decode() for text in rows[TEXT][:, 0]]
        if not self.has_names:
            return _decoded(rows[FEATURES])
        import pandas as pd

        if self.is_joined:
            return pd.DataFrame(_decoded(rows[FEATURES]), columns=[*self.columns])
        return pd.DataFrame(
            {
                name: _decoded(rows[name])[:, 0] if column.is_used else 0.0
                for name, column in self.columns.items()
            }
        )


def describe_inputs(estimator: Any) -> EstimatorInputs:
    """Raises PackageError if the estimator is not fitted, or mixes types without naming columns.

    ValueError and more of attributes that no fitted estimator has.
    """
    from sklearn.compose import ColumnTransformer

    first = next(steps(estimator))
    if (vocabulary := getattr(first, "vocabulary_", None)) is not None:
        return EstimatorInputs({}, True, False, tuple(sorted(map(str, vocabulary))))
    count = getattr(estimator, "n_features_in_", None)
    if count is None:
        raise PackageError(
            "the estimator does not say what it takes: it has no n_features_in_",
            hint="fit it before you save it; documents need a vectorizer with a vocabulary first",
        )
    if not isinstance(count, int | np.integer) or not 0 < count <= _MAX_FEATURES:
        raise PackageError(
            f"the estimator's n_features_in_ is {count!r:.40}, expected 1 to {_MAX_FEATURES}",
            hint="fit it on fewer features",
        )
    count = int(count)
    names = [str(name) for name in getattr(estimator, "feature_names_in_", ())]
    if names and len(set(names)) != count:
        raise PackageError(
            f"the estimator has {len(set(names))} different feature_names_in_, "
            f"expected {count}, its n_features_in_",
            hint="fit it again on a frame whose columns have different names",
        )
    if not isinstance(first, ColumnTransformer):
        return EstimatorInputs(
            dict(zip(names or map(str, range(count)), _columns(estimator, count), strict=True)),
            is_joined=True,
            has_names=bool(names),
        )
    found = _transformed_columns(first, count)
    columns = dict(zip(names or map(str, range(count)), found, strict=True))
    if not names and any(column.is_text for column in found):
        raise PackageError(
            "the estimator was fitted on an array that mixes numbers and text",
            hint="fit it on a pandas DataFrame, whose columns have names and types of their own",
        )
    return EstimatorInputs(columns, is_joined=not names, has_names=bool(names))


def steps(estimator: Any) -> Iterator[Any]:
    """The estimator, or the steps of a pipeline, those of pipelines inside it included."""
    from sklearn.pipeline import Pipeline

    if not isinstance(estimator, Pipeline):
        yield estimator
        return
    for _, step in estimator.steps:
        if step not in (None, "passthrough"):
            yield from steps(step)


def _transformed_columns(transformer: Any, count: int) -> list[Column]:
    """What each column of a frame is, from the transformers that take it."""
    # The converter finds columns by name only where all are named.
    used = [(inner, columns) for _, inner, columns in transformer.transformers_ if _is_used(inner)]
    by_name = all(_are_names(columns) for _, columns in used)
    found = [Column(is_used=not by_name)] * count
    for name, inner, _ in transformer.transformers_:
        indices = transformer._transformer_to_input_indices[name]
        if not _is_used(inner):
            continue
        if any(hasattr(step, "vocabulary_") for step in steps(inner)):
            raise PackageError(
                f"the estimator's column transformer '{name}' reads documents",
                hint="such a model converts only as a pipeline of a vectorizer and an estimator",
            )
        for index, column in zip(indices, _columns(inner, len(indices)), strict=True):
            if found[index] in (Column(), Column(is_used=False)):
                found[index] = column
    return found


def _is_used(transformer: Any) -> bool:
    return not (isinstance(transformer, str) and transformer == "drop")


def _are_names(columns: Any) -> bool:
    return all(isinstance(name, str) for name in np.atleast_1d(np.asarray(columns, dtype=object)))


def _columns(estimator: Any, count: int) -> list[Column]:
    """What the columns are that these steps take: the first step that tells is believed."""
    for step in steps(estimator):
        if (categories := getattr(step, "categories_", None)) is not None:
            return [_category(values) for values in categories]
        statistics = getattr(step, "statistics_", None)
        if statistics is not None and np.asarray(statistics).dtype.kind in "OUS":
            # An imputer of texts; the encoder after it knows which.
            continue
        ranges = _ranges(step)
        if ranges is not None:
            low, high = np.broadcast_arrays(*ranges, np.zeros(count))[:2]
            return [Column(float(a), float(b)) for a, b in zip(low, high, strict=True)]
    return [Column()] * count


def _category(values: Any) -> Column:
    is_text = np.asarray(values).dtype.kind in "OUS"
    # Clients cannot send a missing value, which may be a category too.
    known = [v for v in values if (isinstance(v, str) if is_text else np.isfinite(v))]
    return Column(categories=tuple(known), is_text=is_text)


def _ranges(step: Any) -> tuple[Any, Any] | None:
    """Smallest and largest number worth trying in each column, if the fitted step tells."""
    if getattr(step, "data_min_", None) is not None:
        return step.data_min_, step.data_max_
    for center, scale in (("mean_", "scale_"), ("center_", "scale_")):
        middle, spread = getattr(step, center, None), getattr(step, scale, None)
        if middle is not None and spread is not None:
            return middle - 2 * spread, middle + 2 * spread
    return _split_ranges(step)


def _split_ranges(step: Any) -> tuple[Any, Any] | None:
    """Around the thresholds of decision trees: elsewhere all rows fall into the same leaves."""
    trees = [getattr(tree, "tree_", None) for tree in _trees(step)]
    splits = [(tree.feature, tree.threshold) for tree in trees if tree is not None]
    if not splits:
        return None
    features, thresholds = (np.concatenate(values) for values in zip(*splits, strict=True))
    low, high = np.full(step.n_features_in_, np.inf), np.full(step.n_features_in_, -np.inf)
    # Leaves have feature -2.
    inner = features >= 0
    np.minimum.at(low, features[inner], thresholds[inner])
    np.maximum.at(high, features[inner], thresholds[inner])
    low, high = np.where(low > high, -1.0, low), np.where(low > high, 1.0, high)
    margin = np.maximum(high - low, 1.0) / 2
    return low - margin, high + margin


def _trees(step: Any) -> Iterator[Any]:
    yield step
    yield from np.ravel(getattr(step, "estimators_", ()))


def _decoded(values: Array) -> Array:
    if values.dtype.kind != "O":
        return values
    return np.array(
        [v.decode() if isinstance(v, bytes) else v for v in values.flat], dtype=object
    ).reshape(values.shape)
