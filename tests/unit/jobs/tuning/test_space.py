"""Points are drawn alike from the same seed, lie in their space, and do not repeat."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ConfigError
from jobs.tuning.space import describe, draw_points, with_values
from tests.unit.jobs.tuning.conftest import MakeSweep

SPACE = {
    "optimizer.learning_rate": {"loguniform": [1e-4, 1e-1]},
    "model.dropout": {"uniform": [0.0, 0.5]},
    "model.hidden_size": {"int": [8, 16]},
    "schedule": {"choice": [{"kind": "constant"}, {"kind": "cosine", "warmup_steps": 2}]},
}


@given(seed=st.integers(0, 2**32))
def test_random_points_lie_in_the_space(make_sweep: MakeSweep, seed: int) -> None:
    config = make_sweep(space=SPACE, seed=seed, num_trials=5)
    points = draw_points(config)
    assert points == draw_points(config)
    assert len(points) == 5
    for point in points:
        assert list(point) == list(SPACE)
        assert 1e-4 <= point["optimizer.learning_rate"] <= 1e-1
        assert 0 <= point["model.dropout"] <= 0.5
        assert point["model.hidden_size"] in range(8, 17)
        assert point["schedule"] in SPACE["schedule"]["choice"]


def test_more_trials_begin_with_the_same_points(make_sweep: MakeSweep) -> None:
    few = draw_points(make_sweep(space=SPACE, num_trials=3))
    assert draw_points(make_sweep(space=SPACE, num_trials=9))[:3] == few
    assert draw_points(make_sweep(space=SPACE, seed=1)) != few


def test_grid_search_tries_every_combination_once(make_sweep: MakeSweep) -> None:
    space = {"a": {"choice": [1, 2]}, "b": {"grid": ["x", "y", "x"]}, "c": {"int": [1, 2]}}
    points = draw_points(make_sweep(space=space, search="grid"))
    tried = [tuple(point.values()) for point in points]
    assert tried == list(itertools.product([1, 2], ["x", "y"], [1, 2]))


def test_a_grid_in_a_random_search_is_crossed_with_each_draw(make_sweep: MakeSweep) -> None:
    space = {"a": {"grid": [1, 2]}, "b": {"uniform": [0, 1]}}
    points = draw_points(make_sweep(space=space, num_trials=2))
    assert [point["a"] for point in points] == [1, 2, 1, 2]
    assert points[0]["b"] == points[1]["b"] != points[2]["b"]


def test_a_small_space_gives_no_more_than_it_has(make_sweep: MakeSweep) -> None:
    points = draw_points(make_sweep(space={"a": {"choice": [1, 2, 3]}}, num_trials=10))
    assert sorted(point["a"] for point in points) == [1, 2, 3]


def test_a_grid_too_large_to_try_is_refused_without_listing_it(make_sweep: MakeSweep) -> None:
    for high in (10**9, 10**21):
        space = {"a": {"int": [1, high]}, "b": {"int": [1, high]}}
        with pytest.raises(ConfigError, match=f"has {high**2:,} combinations"):
            draw_points(make_sweep(space=space, search="grid"))


def test_fields_are_set_where_they_belong() -> None:
    config = {"steps": 5, "schedule": {"kind": "cosine"}, "early_stopping": None}
    changed = with_values(config, {"schedule.warmup_steps": 2, "early_stopping.patience": 3})
    assert changed["schedule"] == {"kind": "cosine", "warmup_steps": 2}
    assert changed["early_stopping"] == {"patience": 3}
    assert config["early_stopping"] is None
    with pytest.raises(ConfigError, match=r"field 'steps\.many' does not exist"):
        with_values(config, {"steps.many": 1})


def test_values_are_described_in_one_line() -> None:
    point = {"rate": 0.00123456, "schedule": {"kind": "wsd", "share": 0.5}, "sizes": [1, 2]}
    assert describe(point) == "rate=0.001235 schedule={kind: wsd, share: 0.5} sizes=[1, 2]"
