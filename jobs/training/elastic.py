"""Elastic runs: every number of workers that may come about must be able to share a batch.

Ray Train goes on with as many workers as can be placed, any number from `min_workers` to
`num_workers`; a number that the batch cannot be divided by would end the run in the middle.

    check_worker_counts(config)           # ConfigError, naming the nearest that can
"""

from __future__ import annotations

import math

from cluster.errors import ConfigError
from jobs.training.batching import BatchPlan
from jobs.training.config import TrainConfig


def check_worker_counts(config: TrainConfig) -> None:
    """Raises ConfigError if some number of workers in between cannot work together."""
    least, most = config.min_workers or config.num_workers, config.num_workers
    if least > most:
        raise ConfigError(
            f"min_workers {least} exceeds num_workers {most}",
            hint=f"set min_workers to {most} or less",
            param="min_workers",
        )
    parts = config.parallelism.tensor * config.parallelism.pipeline
    if least < most and parts > 1:
        raise ConfigError(
            f"min_workers {least} cannot be combined with parallelism: {parts} workers share a "
            "copy of the model, and Ray Train may place any number",
            hint="leave min_workers out; lost workers are then replaced by as many",
            param="min_workers",
        )
    illegal = [count for count in range(least, most) if not _can_share(config, count)]
    if illegal:
        raise ConfigError(
            f"min_workers {least} allows {illegal[-1]} workers, who cannot share batch_size "
            f"{config.batch_size} with micro_batch_size {config.micro_batch_size or 'unset'}",
            hint=f"set min_workers to {illegal[-1] + 1}, or batch_size to a multiple of "
            f"{math.lcm(*range(least, most + 1)) * (config.micro_batch_size or 1)}",
            param="min_workers",
        )


def _can_share(config: TrainConfig, count: int) -> bool:
    try:
        BatchPlan.of(config, count)
    except ConfigError:
        return False
    return True
