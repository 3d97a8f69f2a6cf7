"""An answer is slow by what the champion took lately, whatever the machine does meanwhile."""

from __future__ import annotations

import numpy as np

from serve_apps.gateway.releases.slowness import Slowness


def learned(seconds: list[float], size: int = 1) -> Slowness:
    slowness = Slowness()
    for each in seconds:
        slowness.learn("slow", size, each)
    return slowness


def test_nothing_is_known_before_the_champion_has_answered_enough() -> None:
    assert learned([0.01] * 31).judge("slow", 1, 9.0) is None
    assert learned([0.01] * 32).judge("slow", 1, 9.0) is True


def test_each_kind_and_size_has_a_bar_of_its_own() -> None:
    slowness = learned([0.01] * 32)
    assert slowness.judge("slow", 1, 0.0149) is False
    assert slowness.judge("slow", 1, 0.0151) is True
    assert slowness.judge("slow", 64, 0.5) is None
    assert slowness.judge("slow_token", 1, 0.5) is None


def test_the_bar_follows_a_machine_that_becomes_slower() -> None:
    slowness = learned([0.01] * 300 + [0.03] * 300)
    assert slowness.judge("slow", 1, 0.04) is False


def test_of_two_equal_versions_equally_many_answers_are_slow() -> None:
    rng = np.random.default_rng(3)
    slowness, slow = Slowness(), {"champion": 0, "candidate": 0}
    for _ in range(4000):
        for arm in slow:
            seconds = float(rng.lognormal(-4, 1))
            slow[arm] += slowness.judge("slow", 1, seconds) is True
            if arm == "champion":
                slowness.learn("slow", 1, seconds)
    assert abs(slow["champion"] - slow["candidate"]) < 60
    assert 20 < slow["champion"] < 240


def test_most_answers_that_take_three_times_as_long_are_slow() -> None:
    rng = np.random.default_rng(3)
    slowness = learned([float(rng.lognormal(-4, 0.2)) for _ in range(256)])
    slow = [slowness.judge("slow", 1, 3 * float(rng.lognormal(-4, 0.2))) for _ in range(100)]
    assert slow.count(True) > 80
