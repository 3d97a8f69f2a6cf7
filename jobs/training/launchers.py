"""Launchers: who places the workers. `local` is this process; `ray_trainer` has the other one.

launcher.check()                       # resources there? cheap, before anything else
outcome = launcher.run(job, sink)
"""

from __future__ import annotations

from typing import Protocol

import torch

from cluster.errors import MachineError
from jobs.training.config import TrainConfig
from jobs.training.events import Event, Sink
from jobs.training.process_group import start_process_group
from jobs.training.stopping import stop_on_signals
from jobs.training.worker import Outcome, WorkerJob, run_worker


class Launcher(Protocol):
    """Starts workers and waits for them."""

    @property
    def world_size(self) -> int: ...

    def check(self) -> dict[str, str]:
        """Facts about where the run takes place, for its record.

        Raises:
            HeliostatError: the workers could never be placed.
        """

    def run(self, job: WorkerJob, sink: Sink) -> Outcome:
        """Train; `sink` is called in this process.

        Raises:
            StoppedError: SIGTERM or Ctrl-C asked for it; the run can go on later.
        """


class LocalLauncher:
    """This process is the first worker; under torchrun the others run `follow`."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size

    @property
    def world_size(self) -> int:
        return self._world_size

    def check(self) -> dict[str, str]:
        return {}

    def run(self, job: WorkerJob, sink: Sink) -> Outcome:
        group = start_process_group()
        with stop_on_signals() as request:
            return run_worker(group.from_first(job), sink, request.is_set)


def check_local_device(config: TrainConfig) -> None:
    """Raises MachineError if this process is to train on a GPU that is not there."""
    if config.device == "gpu" and not torch.cuda.is_available():
        raise MachineError(
            "device is 'gpu', and this machine has none that torch can use",
            hint="set device to cpu or auto",
            param="device",
        )


def follow() -> None:
    """What torchrun's other workers do: wait for the first one's job, and work on it."""
    job: WorkerJob = start_process_group().from_first(None)
    with stop_on_signals() as request:
        run_worker(job, _ignore, request.is_set)


def _ignore(_event: Event) -> None:
    """The first worker reports."""
