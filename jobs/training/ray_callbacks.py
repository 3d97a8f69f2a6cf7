"""What Ray Train's controller asks us about failures. Imported only where Ray Train is in use.

RunConfig(callbacks=[GiveUpOnOurErrors()])
"""

from __future__ import annotations

from typing import Any

from ray.train import UserCallback

from cluster.errors import HeliostatError
from jobs.training.ray_trainer import innermost


class GiveUpOnOurErrors(UserCallback):  # type: ignore[misc]
    """An error of ours, such as a loss that is no number, comes back however often one tries.

    Raising here ends the run at once; everything else counts as a lost worker and is retried.
    """

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for error in worker_exceptions.values():
            cause = innermost(error)
            if isinstance(cause, HeliostatError):
                raise cause
