"""How many trials at a time: as many as have all their workers placed at once. Pure.

A trial's own process takes no CPU, its workers one CPU or GPU each; with no more trials than fit,
none ever waits for workers while it holds others.

    num_concurrent(plan, Capacity(num_cpus=8))
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.errors import MachineError
from jobs.training.config import TrainConfig
from jobs.training.ray_trainer import wants_gpu
from jobs.tuning.plan import Plan


@dataclass(frozen=True)
class Capacity:
    """What workers may be placed on."""

    num_cpus: int
    num_gpus: int = 0


def num_concurrent(plan: Plan, capacity: Capacity) -> int:
    """Raises MachineError if a trial does not fit, or fewer fit than were asked for."""
    most = min(_room_for(trial.config, capacity) for trial in plan.trials)
    wanted = plan.config.max_concurrent
    if wanted is not None and wanted > most:
        raise MachineError(
            f"max_concurrent is {wanted}, and there is room for {most} of these trials at a time",
            hint=f"set max_concurrent to {most} or less, leave it out, or add nodes",
            param="max_concurrent",
        )
    return min(wanted or most, len(plan.trials))


def _room_for(config: TrainConfig, capacity: Capacity) -> int:
    is_gpu = wants_gpu(config, capacity.num_gpus)
    there = capacity.num_gpus if is_gpu else capacity.num_cpus
    if there < config.num_workers:
        kind = "GPU" if is_gpu else "CPU"
        smaller = f"give trials num_workers {there} or less" if there else "set device to cpu"
        raise MachineError(
            f"a trial's num_workers is {config.num_workers}, and there are {there} {kind}s",
            hint=f"{smaller}, in overrides or in the space, or add nodes",
            param="num_workers" if there else "device",
        )
    return there // config.num_workers
