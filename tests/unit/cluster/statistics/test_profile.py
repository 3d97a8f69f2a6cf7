"""Profiles: what is counted, that nothing falls between two bins, and what old packages have."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cluster.statistics.features import input_features, output_features, text_features
from cluster.statistics.profile import (
    DISTRIBUTIONS,
    MAX_FEATURES,
    Categories,
    DataProfile,
    Numbers,
    describe,
    describe_tokens,
    read_profile,
)


def numbers_of(values: list[float]) -> Numbers:
    (feature,) = describe({"x": np.array(values)}).values()
    assert isinstance(feature, Numbers)
    return feature


def test_a_number_has_bins_of_about_equal_size() -> None:
    feature = numbers_of(np.random.default_rng(0).normal(size=10_000).tolist())
    assert len(feature.counts) == 10
    assert min(feature.counts) > 990
    assert max(feature.counts) < 1010


@given(st.lists(st.floats(-1e9, 1e9, width=32), min_size=1, max_size=60))
def test_every_value_is_in_exactly_one_bin_and_the_profile_survives_json(
    values: list[float],
) -> None:
    feature = numbers_of(values)
    assert sum(feature.counts) == len(values)
    again = Numbers.model_validate_json(feature.model_dump_json())
    assert again.count(np.array(values, dtype=np.float32)).tolist() == list(feature.counts)


def test_values_a_rounding_error_away_stay_in_their_bin() -> None:
    pixels = np.random.default_rng(1).integers(0, 17, 2000).astype(float)
    feature = numbers_of(pixels.tolist())
    from_pictures = np.round(pixels * 255 / 16) * 16 / 255
    assert feature.count(from_pictures).tolist() == list(feature.counts)


def test_a_constant_feature_shows_a_change_to_either_side() -> None:
    feature = numbers_of([3.0] * 50)
    assert feature.count(np.array([2.0, 3.0, 4.0, np.nan])).tolist() == [1, 1, 1]


def test_texts_are_counted_by_category_and_unknown_ones_as_others() -> None:
    (feature,) = describe({"label": np.array(["a", "b", "a"], dtype=object)}).values()
    assert isinstance(feature, Categories)
    assert feature.counts == (2, 1, 0)
    found = np.array([b"a", b"b", "\u2603"], dtype=object)
    assert feature.count(found).tolist() == [1, 1, 1]


def test_tokens_are_spread_over_buckets() -> None:
    ids = np.arange(64_000)
    feature = describe_tokens(ids)
    assert sum(feature.counts) == len(ids)
    assert min(feature.counts) > 900
    assert feature.count(ids[:1]).sum() == 1


def test_features_of_tensors() -> None:
    rows = np.arange(6.0).reshape(2, 3)
    assert list(input_features({"features": rows}, ("a", "b", "c"))) == ["a", "b", "c"]
    assert list(input_features({"pixels": rows.reshape(2, 1, 3)})) == [
        "pixels[0]", "pixels[1]", "pixels[2]",
    ]  # fmt: skip
    wide = input_features({"image": np.ones((2, MAX_FEATURES + 1))})
    assert {name: values.shape for name, values in wide.items()} == {
        "image.mean": (2,), "image.spread": (2,),
    }  # fmt: skip
    label = np.array([b"x", b"y"], dtype=object)
    outputs = output_features({"label": label, "probabilities": rows})
    assert outputs["probabilities.max"].tolist() == [2.0, 5.0]
    assert outputs["label"].tolist() == [b"x", b"y"]
    texts = text_features([np.array([5, 6]), np.array([7])])
    assert texts["length"].tolist() == [2, 1]
    assert texts["tokens"].tolist() == [5, 6, 7]


def test_profiles_are_bounded() -> None:
    many = {f"f{i}": np.arange(3.0) for i in range(MAX_FEATURES + 5)}
    profile = DataProfile(inputs=describe(many))
    assert len(profile.inputs) == MAX_FEATURES
    with pytest.raises(ValidationError):
        DataProfile(inputs={f"f{i}": Numbers(edges=(), counts=(0,)) for i in range(65)})
    with pytest.raises(ValidationError):
        Numbers(edges=(2.0, 1.0), counts=(0, 0, 0))
    with pytest.raises(ValidationError):
        Categories(names=("a",), counts=(0,))


def test_what_a_manifest_says_is_read_and_packages_without_it_are_not_watched() -> None:
    profile = DataProfile(inputs=describe({"x": np.arange(9.0)}))
    stored = json.loads(json.dumps({DISTRIBUTIONS: profile.model_dump(mode="json")}))
    assert read_profile(stored) == profile
    assert read_profile({}) is None
    assert read_profile({"unigram_entropy": 6.5}) is None
    assert read_profile({DISTRIBUTIONS: {"inputs": {"x": {"kind": "of later times"}}}}) is None
