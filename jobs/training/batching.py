"""How a global batch is cut into what each worker takes at a time. Pure arithmetic.

plan = BatchPlan.make(batch_size=32, micro_batch_size=4, world_size=2)
plan.accumulation_steps    # 4
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cluster.errors import ConfigError
from jobs.training.config import TrainConfig

_MAX_CHOICES = 12


@dataclass(frozen=True)
class BatchPlan:
    """batch_size = micro_batch_size * accumulation_steps * world_size.

    `world_size` counts those that take different rows: where workers share a copy of the model, the
    copies.
    """

    batch_size: int
    micro_batch_size: int
    accumulation_steps: int
    world_size: int

    @classmethod
    def of(cls, config: TrainConfig, num_copies: int) -> BatchPlan:
        """Of a run with so many copies of the model; raises ConfigError as `make` does."""
        return cls.make(
            batch_size=config.batch_size,
            micro_batch_size=config.micro_batch_size,
            world_size=num_copies,
        )

    @classmethod
    def make(cls, *, batch_size: int, micro_batch_size: int | None, world_size: int) -> BatchPlan:
        """Raises ConfigError if the parts do not divide."""
        share, rest = divmod(batch_size, world_size)
        if rest:
            raise ConfigError(
                f"batch_size {batch_size} cannot be shared equally by {world_size} workers",
                hint=f"set batch_size to {max(1, round(batch_size / world_size)) * world_size}",
                param="batch_size",
            )
        micro = micro_batch_size or share
        if share % micro:
            nearest = sorted(divisors(share), key=lambda count: abs(count - micro))[:_MAX_CHOICES]
            raise ConfigError(
                f"micro_batch_size {micro} does not divide a worker's {share} rows per step",
                hint=f"choose one of: {', '.join(map(str, sorted(nearest)))}",
                param="micro_batch_size",
            )
        return cls(batch_size, micro, share // micro, world_size)


def divisors(number: int) -> list[int]:
    """Of a positive number, sorted; in the time of its square root."""
    small = [count for count in range(1, math.isqrt(number) + 1) if number % count == 0]
    return sorted({*small, *(number // count for count in small)})
