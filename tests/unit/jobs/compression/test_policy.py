"""Which candidate is taken, by the tables."""

from __future__ import annotations

import math

import pytest

from jobs.compression.policy import CompressionPolicy, Measured

PARENT = Measured("demo/1", 1000, 2.0)
POLICY = CompressionPolicy("loss", max_loss_increase=0.01)


def test_the_smallest_within_the_budget_is_taken() -> None:
    int8, int4 = Measured("int8", 400, 2.0), Measured("int4", 200, 2.01)
    found = POLICY.decide(PARENT, [int8, int4])
    assert found.chosen is int4
    assert found.reason == (
        "int4 is the smallest of 2 within the budget: 5.00 times smaller, "
        "loss 2 -> 2.01 (+0.50%, at most +1.00%)"
    )


def test_a_smaller_one_beyond_the_budget_is_not() -> None:
    int8, int4 = Measured("int8", 400, 3.0), Measured("int4", 200, 3.001)
    half = CompressionPolicy("loss", max_loss_increase=0.5)
    assert half.decide(PARENT, [int4, int8]).chosen is int8, "the budget itself is within it"


def test_without_one_within_the_budget_the_best_found_is_named() -> None:
    found = POLICY.decide(PARENT, [Measured("a", 200, 3.0), Measured("b", 300, 2.5)])
    assert found.chosen is None
    assert found.reason == (
        "none stays within the budget; the best found is b, loss 2 -> 2.5 (+25.00%, at most +1.00%)"
    )


def test_a_larger_file_is_no_compression() -> None:
    found = POLICY.decide(PARENT, [Measured("a", 1200, 1.0), Measured("b", 1000, 1.0)])
    assert found.chosen is None
    assert found.reason == (
        "none is smaller than demo/1 (1,000 bytes); the smallest found is b (1,000 bytes)"
    )


def test_zeros_count_where_the_size_is_the_same() -> None:
    half, most = Measured("a", 1000, 2.0, density=0.5), Measured("b", 1000, 2.0, density=0.1)
    assert POLICY.decide(PARENT, [half, most]).chosen is most


def test_what_cannot_be_packaged_is_not_taken_and_says_why() -> None:
    refused = Measured("a", 100, 2.0, refusal="it is another model")
    assert POLICY.decide(PARENT, [refused, Measured("b", 500, 2.0)]).chosen.label == "b"  # type: ignore[union-attr]
    found = POLICY.decide(PARENT, [refused])
    assert (found.chosen, found.reason) == (None, "none can be packaged; a: it is another model")


@pytest.mark.parametrize(
    ("before", "after", "increase"),
    [
        (2.0, 2.0, 0.0),
        (2.0, 1.0, -0.5),
        (0.0, 0.0, 0.0),
        (0.0, 0.1, math.inf),
        (2.0, math.inf, math.inf),
        (2.0, math.nan, math.inf),
    ],
)
def test_the_increase_is_relative(before: float, after: float, increase: float) -> None:
    parent, candidate = Measured("p", 2, before), Measured("c", 1, after)
    assert POLICY.increase(parent, candidate) == increase
