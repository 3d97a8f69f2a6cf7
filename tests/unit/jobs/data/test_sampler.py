"""Laws of the stateless sampler."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.data.sampler import global_batch, ids_for_rank, permute

sizes = st.integers(1, 3000)
seeds = st.integers(0, 2**31)


@given(size=sizes, seed=seeds, epoch=st.integers(0, 1000))
def test_a_permutation_visits_every_row_once(size: int, seed: int, epoch: int) -> None:
    ids = permute(np.arange(size), size=size, key=(seed, epoch))
    assert np.array_equal(np.sort(ids), np.arange(size))


@given(
    num_rows=sizes,
    seed=seeds,
    step=st.integers(0, 500),
    share=st.integers(1, 8),
    num_workers=st.sampled_from([1, 2, 3, 4, 8]),
)
def test_a_step_sees_the_same_rows_for_any_number_of_workers(
    num_rows: int, seed: int, step: int, share: int, num_workers: int
) -> None:
    batch_size = 24 * share
    ids = global_batch(num_rows=num_rows, batch_size=batch_size, seed=seed, step=step)
    parts = [ids_for_rank(ids, rank=r, world_size=num_workers) for r in range(num_workers)]
    assert np.array_equal(np.concatenate(parts), ids)


@given(num_rows=st.integers(1, 200), batch_size=st.integers(1, 64), seed=seeds)
def test_each_epoch_holds_every_row_once_whatever_the_batch_size(
    num_rows: int, batch_size: int, seed: int
) -> None:
    num_steps = -(-2 * num_rows // batch_size)
    ids = np.concatenate(
        [
            global_batch(num_rows=num_rows, batch_size=batch_size, seed=seed, step=step)
            for step in range(num_steps)
        ]
    )
    for epoch in range(2):
        part = ids[epoch * num_rows : (epoch + 1) * num_rows]
        assert np.array_equal(np.sort(part), np.arange(num_rows))


def test_seeds_and_epochs_differ_in_order() -> None:
    orders = {tuple(permute(np.arange(100), size=100, key=key)) for key in [(0, 0), (0, 1), (1, 0)]}
    assert len(orders) == 3


def test_the_order_is_the_one_of_earlier_releases() -> None:
    """A resumed run must go on with the rows it would have seen."""
    ids = global_batch(num_rows=10, batch_size=10, seed=0, step=0)
    assert ids.tolist() == [9, 5, 8, 7, 6, 4, 0, 2, 3, 1]


def test_positions_spread_evenly() -> None:
    """Mean position of the first tenth over many seeds; 5 sigma, so it fails once in 10^6 seeds."""
    size, num_seeds = 1000, 200
    firsts = [permute(np.arange(100), size=size, key=(seed, 0)).mean() for seed in range(num_seeds)]
    sigma = size / np.sqrt(12) / np.sqrt(100 * num_seeds)
    assert abs(np.mean(firsts) - (size - 1) / 2) < 5 * sigma


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="a batch of 5 cannot be shared by 2 workers"):
        ids_for_rank(np.arange(5), rank=0, world_size=2)
