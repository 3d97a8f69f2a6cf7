from __future__ import annotations

import pytest

from cluster.errors import ConfigError
from jobs.training.batching import BatchPlan, divisors


@pytest.mark.parametrize("number", [1, 2, 12, 36, 97, 360])
def test_divisors_are_all_that_divide(number: int) -> None:
    assert divisors(number) == [n for n in range(1, number + 1) if number % n == 0]


def test_a_large_prime_is_refused_at_once_with_its_two_divisors() -> None:
    with pytest.raises(ConfigError, match=r"choose one of: 1, 1000000007$"):
        BatchPlan.make(batch_size=1_000_000_007, micro_batch_size=3, world_size=1)


def test_the_choices_are_the_nearest_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        BatchPlan.make(batch_size=1_102_701_600, micro_batch_size=23, world_size=1)
    choices = [int(part) for part in str(caught.value).rpartition(": ")[2].split(", ")]
    assert len(choices) == 12
    assert choices == sorted(choices)
    assert {22, 24} <= set(choices)
