"""What a run remembers beside weights and optimizer, saved with every checkpoint.

The step says which rows come next, and random state follows from it; so this is small, and plain
JSON. It knows nothing of engines or files.

    memory = RunMemory(monitor=observe(memory.monitor, config, metrics, step))
    RunMemory.model_validate(memory.model_dump(mode="json")) == memory
"""

from __future__ import annotations

from cluster.config import StrictModel
from jobs.training.monitor import MonitorState
from jobs.training.recovery import RecoveryState


class RunMemory(StrictModel):
    """Everything that a resumed run must know to do what an unbroken one does."""

    monitor: MonitorState = MonitorState()
    """What past evaluations have decided."""
    recovery: RecoveryState = RecoveryState()
    """What past losses say of the next."""
    quarantine: tuple[int, ...] = ()
    """Rows that are masked wherever they come up, sorted."""
    useful_s: float = 0.0
    """Seconds that its steps took, each counted once."""
