"""Error odds are checked by simulation: a statement about a test is a statement about many."""

import numpy as np
import pytest

from cluster.errors import InputError
from cluster.statistics.paired import MIN_ROWS, compare_means, compare_proportions

ALPHA = 0.05
NUM_TRIALS = 2000
# Four standard errors of a share of ALPHA over NUM_TRIALS.
TOLERANCE = 4 * (ALPHA * (1 - ALPHA) / NUM_TRIALS) ** 0.5


@pytest.mark.parametrize("spread", ["normal", "skewed"])
def test_a_worse_mean_passes_no_more_often_than_stated(spread: str) -> None:
    random = np.random.default_rng(0)
    passed = 0
    for _ in range(NUM_TRIALS):
        champion = random.normal(size=200)
        noise = random.normal(size=200) if spread == "normal" else random.exponential(size=200) - 1
        passed += compare_means(champion - 0.1 + noise, champion, margin=0.1).p_value <= ALPHA
    assert passed / NUM_TRIALS <= ALPHA + TOLERANCE


@pytest.mark.parametrize("num_rows", [60, 300])
@pytest.mark.parametrize("win_share", [0.0, 0.05])
def test_a_worse_proportion_passes_no_more_often_than_stated(
    num_rows: int, win_share: float
) -> None:
    """With few differing rows too, where a t-test passes such a candidate in 30 % of the cases."""
    random = np.random.default_rng(1)
    margin = 0.02
    passed = 0
    for _ in range(NUM_TRIALS):
        drawn = random.random(num_rows)
        lost, won = drawn < win_share + margin, drawn > 1 - win_share
        champion = np.where(lost, 1.0, np.where(won, 0.0, 1.0))
        candidate = np.where(lost, 0.0, np.where(won, 1.0, 1.0))
        passed += compare_proportions(candidate, champion, margin=margin).p_value <= ALPHA
    assert passed / NUM_TRIALS <= ALPHA + TOLERANCE


def test_an_equal_model_passes_when_there_are_rows_enough() -> None:
    random = np.random.default_rng(2)
    champion = (random.random(2000) < 0.9).astype(float)
    candidate = np.where(random.random(2000) < 0.02, 1 - champion, champion)
    assert compare_proportions(champion, champion, margin=0.01).p_value <= ALPHA
    assert compare_proportions(candidate, champion, margin=0.05).p_value <= ALPHA
    noise = random.normal(scale=0.1, size=2000)
    assert compare_means(champion + noise, champion, margin=0.02).p_value <= ALPHA


def test_without_a_margin_it_is_mcnemars_test() -> None:
    candidate = np.array([1.0] * 90 + [0.0] * 10)
    champion = np.array([1.0] * 80 + [0.0] * 10 + [1.0] * 2 + [0.0] * 8)
    result = compare_proportions(candidate, champion, margin=0.0)
    assert result.mean_difference == pytest.approx(0.08)
    # (10 - 2) / sqrt(10 + 2) standard errors
    assert result.p_value == pytest.approx(0.01046, abs=1e-4)


def test_values_without_spread_say_what_they_say() -> None:
    champion = np.zeros(MIN_ROWS)
    assert compare_means(champion - 0.5, champion, margin=1.0).p_value == 0.0
    assert compare_means(champion - 2.0, champion, margin=1.0).p_value == 1.0
    assert compare_proportions(champion, champion, margin=0.0).p_value == 1.0


@pytest.mark.parametrize(
    ("candidate", "champion", "message"),
    [
        (np.zeros(MIN_ROWS - 1), np.zeros(MIN_ROWS - 1), "too few"),
        (np.zeros(40), np.zeros(41), "40 and 41"),
        (np.array([0.0] * 39 + [np.nan]), np.zeros(40), "row 39"),
    ],
)
def test_values_that_cannot_be_compared_are_refused(
    candidate: np.ndarray, champion: np.ndarray, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        compare_means(candidate, champion, margin=0.0)


def test_a_proportion_of_other_values_is_refused() -> None:
    with pytest.raises(InputError, match="0 or 1"):
        compare_proportions(np.full(40, 0.5), np.zeros(40), margin=0.0)
