"""Drift: no alarm on the same data, an alarm on other data, in bounded memory."""

from __future__ import annotations

import numpy as np
import pytest

from cluster.statistics.drift import DriftWindow, FeatureDrift, WindowCounts, add_up, measure
from cluster.statistics.profile import Array, DataProfile, describe, describe_tokens


def profile_of(**values: Array) -> DataProfile:
    return DataProfile(inputs=describe(values))


def window_of(
    profile: DataProfile, *batches: dict[str, Array], half_life: float = 5000.0
) -> DriftWindow:
    window = DriftWindow(profile, half_life_rows=half_life)
    for batch in batches:
        window.add("inputs", batch, num_rows=len(next(iter(batch.values()))))
    return window


@pytest.mark.parametrize("seed", range(5))
def test_the_same_distribution_is_far_below_any_alarm(seed: int) -> None:
    random = np.random.default_rng(seed)
    profile = profile_of(x=random.normal(size=2000), label=random.choice(["a", "b", "c"], 2000))
    batch = {"x": random.normal(size=1000), "label": random.choice(["a", "b", "c"], 1000)}
    found = measure(profile, window_of(profile, batch).counts)["inputs"]
    assert found["x"].psi < 0.1
    assert found["x"].ks is not None
    assert found["x"].ks < 0.1
    assert found["label"].psi < 0.05
    assert found["label"].ks is None


def test_a_shift_a_new_spread_and_new_categories_are_seen() -> None:
    random = np.random.default_rng(7)
    profile = profile_of(x=random.normal(size=2000), label=random.choice(["a", "b"], 2000))

    def drift(**values: Array) -> dict[str, FeatureDrift]:
        return measure(profile, window_of(profile, values).counts)["inputs"]

    shifted = drift(x=random.normal(1, 1, size=1000))["x"]
    assert shifted.psi > 0.5
    assert shifted.ks == pytest.approx(0.38, abs=0.06)  # of two normals one apart: 2Φ(½) - 1
    assert drift(x=random.normal(0, 3, size=1000))["x"].psi > 0.25
    assert drift(label=np.array(["c"] * 100, dtype=object))["label"].psi > 5
    tokens = DataProfile(inputs={"tokens": describe_tokens(np.arange(1000) % 50)})
    other = window_of(tokens, {"tokens": np.arange(1000) % 50 + 300})
    assert measure(tokens, other.counts)["inputs"]["tokens"].psi > 1


def test_psi_and_ks_are_what_the_definitions_say() -> None:
    profile = profile_of(x=np.array([0.0] * 500 + [1.0] * 500))
    found = measure(profile, window_of(profile, {"x": np.array([0.0] * 200 + [1.0] * 800)}).counts)
    drift = found["inputs"]["x"]
    expected = (0.2 - 0.5) * np.log(0.2 / 0.5) + (0.8 - 0.5) * np.log(0.8 / 0.5)
    assert drift.psi == pytest.approx(expected, abs=0.005)
    assert drift.ks == pytest.approx(0.3)


def test_older_rows_fade_and_memory_does_not_grow() -> None:
    profile = profile_of(x=np.linspace(0, 1, 1000))
    window = DriftWindow(profile, half_life_rows=1000)
    for _ in range(50):
        window.add("inputs", {"x": np.full(1000, 9.0)}, num_rows=1000)
    held = window.counts
    assert held.rows["inputs"] == pytest.approx(2000, rel=0.01)
    assert sum(counts.size for counts in held.counts["inputs"].values()) == 10
    for _ in range(10):
        window.add("inputs", {"x": np.linspace(0, 1, 1000)}, num_rows=1000)
    assert measure(profile, window.counts)["inputs"]["x"].psi < 0.01
    held_before = held.counts["inputs"]["x"][-1]
    assert held_before > window.counts.counts["inputs"]["x"][-1], "counts are a copy"


def test_windows_of_several_gateways_add_up_through_json() -> None:
    random = np.random.default_rng(3)
    profile = profile_of(x=random.normal(size=1000))
    halves = [{"x": random.normal(size=300)} for _ in range(2)]
    together = window_of(profile, *halves, half_life=1e12).counts
    apart = [
        WindowCounts.from_json(window_of(profile, half, half_life=1e12).counts.to_json())
        for half in halves
    ]
    total = add_up(profile, apart)
    assert total.rows["inputs"] == pytest.approx(600)
    assert np.allclose(total.counts["inputs"]["x"], together.counts["inputs"]["x"], atol=0.02)


def test_counts_of_another_profile_are_left_out() -> None:
    profile = profile_of(x=np.arange(100.0))
    foreign = WindowCounts({"inputs": 5.0}, {"inputs": {"x": np.ones(3), "y": np.ones(4)}})
    total = add_up(profile, [foreign])
    assert measure(profile, total)["inputs"] == {}


def test_features_that_were_not_sent_say_nothing() -> None:
    profile = profile_of(x=np.arange(100.0), y=np.arange(100.0))
    found = measure(profile, window_of(profile, {"x": np.arange(100.0)}).counts)
    assert list(found["inputs"]) == ["x"]
    assert found["outputs"] == {}
