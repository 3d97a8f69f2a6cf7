"""What data looked like: for each feature, how many values fell into each of a few bins.

Written where a model is trained and kept in its package's manifest, as `profile.distributions`;
`cluster.statistics.drift` compares what is served with it. A package without one is not watched.

    profile = DataProfile(inputs=describe(values_by_feature))
    manifest_profile["distributions"] = profile.model_dump(mode="json")
    read_profile(manifest.profile)                  # DataProfile | None
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, JsonValue, ValidationError, model_validator

from cluster.config import StrictModel

Array = npt.NDArray[Any]
Counts = npt.NDArray[np.float64]

DISTRIBUTIONS = "distributions"
"""Key of a manifest's profile."""
MAX_FEATURES = 64
"""On each side of a model: the inputs, the outputs."""
_NUM_BINS = 10
_MAX_BINS = 256
_MAX_CATEGORIES = 32
_NUM_BUCKETS = 64
_SPREAD_BITS = 2_654_435_761
"""Knuth's multiplier: neighbouring token ids, which are of like frequency, fall far apart."""

BinCounts = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(max_length=_MAX_BINS)]


class Numbers(StrictModel):
    """A number, in bins that held about equally many of the training data's values."""

    kind: Literal["numbers"] = "numbers"
    edges: Annotated[tuple[float, ...], Field(max_length=_MAX_BINS - 1)]
    """Rising. Bin i holds what is above edge i - 1 and not above edge i."""
    counts: BinCounts

    @model_validator(mode="after")
    def _bins(self) -> Self:
        rises = all(low < high for low, high in zip(self.edges, self.edges[1:], strict=False))
        if len(self.counts) != len(self.edges) + 1 or not rises:
            raise ValueError("edges must rise, and have one count more than there are")
        return self

    def count(self, values: Array) -> Counts:
        """How many of these values are in each bin; NaN is in none."""
        known = values[~np.isnan(values)]
        bins = np.searchsorted(np.asarray(self.edges), known, side="left")
        return np.bincount(bins, minlength=len(self.counts)).astype(np.float64)


class Categories(StrictModel):
    """A text of few; the last count is of all others."""

    kind: Literal["categories"] = "categories"
    names: Annotated[tuple[str, ...], Field(max_length=_MAX_BINS - 1)]
    counts: BinCounts

    @model_validator(mode="after")
    def _bins(self) -> Self:
        if len(self.counts) != len(self.names) + 1 or len(set(self.names)) < len(self.names):
            raise ValueError("names must differ, and have one count more than there are")
        return self

    def count(self, values: Array) -> Counts:
        """How many of these texts, or bytes, are of each category."""
        bins = {name: i for i, name in enumerate(self.names)}
        others = len(self.names)
        found = [bins.get(text_of(value), others) for value in values.tolist()]
        return np.bincount(found, minlength=others + 1).astype(np.float64)


class Tokens(StrictModel):
    """Token ids, in buckets that each hold many."""

    kind: Literal["tokens"] = "tokens"
    counts: BinCounts

    def count(self, values: Array) -> Counts:
        """How many of these ids are in each bucket."""
        spread = (values.astype(np.uint64) * np.uint64(_SPREAD_BITS)) & np.uint64(0xFFFF_FFFF)
        buckets = (spread * np.uint64(len(self.counts))) >> np.uint64(32)
        return np.bincount(buckets.astype(np.intp), minlength=len(self.counts)).astype(np.float64)


Feature = Annotated[Numbers | Categories | Tokens, Field(discriminator="kind")]
Features = Annotated[dict[str, Feature], Field(max_length=MAX_FEATURES)]


class DataProfile(StrictModel):
    """Features by name, of what goes in and of what comes out."""

    inputs: Features = Field(default_factory=dict)
    """Of the training split, as the graph takes it."""
    outputs: Features = Field(default_factory=dict)
    """Of the model's answers to the validation split."""


def read_profile(profile: Mapping[str, JsonValue]) -> DataProfile | None:
    """What a manifest says of its data; None where it says nothing that is understood here."""
    if DISTRIBUTIONS not in profile:
        return None
    try:
        return DataProfile.model_validate(profile[DISTRIBUTIONS])
    except ValidationError:
        return None


def describe(values: Mapping[str, Array]) -> dict[str, Feature]:
    """The first features of some data; those without any values are left out."""
    found = {name: _describe(array) for name, array in values.items() if len(array)}
    return dict(list(found.items())[:MAX_FEATURES])


def describe_tokens(ids: Array) -> Tokens:
    """The distribution of token ids."""
    empty = Tokens(counts=(0,) * _NUM_BUCKETS)
    return Tokens(counts=_whole(empty.count(ids)))


def text_of(value: object) -> str:
    """A category's name, of a tensor's bytes or of text."""
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _describe(values: Array) -> Feature:
    if values.dtype.kind in "OSU":
        return _describe_texts([text_of(value) for value in values.tolist()])
    numbers = values.astype(np.float64)
    edges = _edges(numbers[np.isfinite(numbers)])
    return Numbers(
        edges=edges,
        counts=_whole(Numbers(edges=edges, counts=(0,) * (len(edges) + 1)).count(numbers)),
    )


def _describe_texts(texts: list[str]) -> Categories:
    names, counts = np.unique(np.asarray(texts, dtype=object), return_counts=True)
    most = np.sort(np.argsort(-counts, kind="stable")[:_MAX_CATEGORIES])
    chosen = tuple(str(name) for name in names[most])
    others = len(texts) - int(counts[most].sum())
    return Categories(names=chosen, counts=(*_whole(counts[most]), others))


def _edges(values: Counts) -> tuple[float, ...]:
    """Between the values that part the data into equal bins and the next larger ones.

    So that what comes a rounding error away from a value, as from a picture, is still in its bin.
    """
    distinct = np.unique(values)
    if len(distinct) < 2:
        # Whatever was always the same is to be seen when it changes.
        (value,) = distinct if len(distinct) else (0.0,)
        margin = max(abs(float(value)), 1.0) * 1e-3
        return (float(value) - margin, float(value) + margin)
    shares = np.arange(1, _NUM_BINS) / _NUM_BINS
    cuts = np.quantile(values, shares, method="inverted_cdf")
    below = np.unique(np.minimum(np.searchsorted(distinct, cuts), len(distinct) - 2))
    middles = distinct[below] + (distinct[below + 1] - distinct[below]) / 2
    return tuple(float(edge) for edge in np.unique(middles))


def _whole(counts: Array) -> tuple[int, ...]:
    return tuple(int(count) for count in counts)
