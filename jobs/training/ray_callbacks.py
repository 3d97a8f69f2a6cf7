"""What Ray Train's controller asks us about failures. Imported only where Ray Train is in use.

RunConfig(callbacks=[OnLostWorkers(queue.put)])
"""

from __future__ import annotations

from typing import Any

from ray.exceptions import RayActorError
from ray.train import UserCallback

from cluster.errors import HeliostatError
from jobs.training.events import UNKNOWN_STEP, Fault, Sink
from jobs.training.ray_trainer import innermost


class OnLostWorkers(UserCallback):  # type: ignore[misc]
    """Tells of lost workers, which Ray Train replaces, and gives up on errors of ours.

    An error of ours, such as a model that has diverged, comes back however often one tries; raising
    here ends the run at once.
    """

    def __init__(self, tell: Sink) -> None:
        self._tell = tell

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        causes = {rank: innermost(error) for rank, error in worker_exceptions.items()}
        for cause in causes.values():
            if isinstance(cause, HeliostatError):
                raise cause
        self._tell(Fault(UNKNOWN_STEP, "worker_lost", describe(causes)))


def describe(causes: dict[int, BaseException]) -> str:
    """The worker that went first: when one is gone, what its peers raise is of no interest."""
    gone = {rank: cause for rank, cause in causes.items() if isinstance(cause, RayActorError)}
    rank, cause = min((gone or causes).items())
    lines = str(cause).strip().splitlines() or [""]
    reason = "its process has ended" if gone else f"{type(cause).__name__}: {lines[0]}"
    return f"worker {rank} is lost ({reason}); workers are replaced, from the last checkpoint"
