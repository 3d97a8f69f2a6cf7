"""The stateless sampler: which rows belong to a step, from (seed, step) alone.

Every epoch visits each row once, in an order that a keyed permutation gives position by position:
nothing is stored or shuffled, and resuming, or changing the number of workers, needs only the step.
It knows nothing about workers' processes or data.

    ids = global_batch(num_rows=1000, batch_size=32, seed=0, step=17)   # for any world size
    ids_for_rank(ids, rank=1, world_size=2)
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]

# Four rounds make a Feistel network with good round functions a strong permutation (Luby and
# Rackoff, 1988); two more cost microseconds.
_NUM_ROUNDS = 6


def global_batch(*, num_rows: int, batch_size: int, seed: int, step: int) -> Ids:
    """Row ids of the whole step, over all workers; step counts from 0.

    Positions run on through the epochs, so a batch may end one epoch and begin the next.
    """
    positions = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)
    epochs, offsets = np.divmod(positions, num_rows)
    ids = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        ids[here] = permute(offsets[here], size=num_rows, key=(seed, int(epoch)))
    return ids


def ids_for_rank(ids: Ids, *, rank: int, world_size: int) -> Ids:
    """The consecutive slice of a global batch that one worker trains on."""
    if len(ids) % world_size:
        raise ValueError(f"a batch of {len(ids)} cannot be shared by {world_size} workers")
    size = len(ids) // world_size
    return ids[rank * size : (rank + 1) * size]


def permute(positions: Ids, *, size: int, key: tuple[int, int]) -> Ids:
    """Where a keyed permutation of range(size) sends `positions`.

    A balanced Feistel network over the next even number of bits, walked until the value falls
    inside the range again (Black and Rogaway, 2002): at most four times as many values as needed,
    so two walks on average.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    round_keys = _round_keys(key)
    values = _feistel(positions.astype(np.uint64), half_bits, round_keys)
    outside = values >= size
    while outside.any():
        values[outside] = _feistel(values[outside], half_bits, round_keys)
        outside = values >= size
    return values.astype(np.int64)


def _round_keys(key: tuple[int, int]) -> npt.NDArray[np.uint64]:
    return np.random.SeedSequence(key).generate_state(_NUM_ROUNDS, np.uint64).astype(np.uint64)


def _feistel(
    values: npt.NDArray[np.uint64], half_bits: int, round_keys: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint64]:
    shift = np.uint64(half_bits)
    mask = np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for round_key in round_keys:
        left, right = right, left ^ (_mix(right + round_key) & mask)
    return (left << shift) | right


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """splitmix64's finaliser: every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
