"""Learning-rate schedules: pure functions of the step, so resuming needs no schedule state.

learning_rate(CosineSchedule(kind="cosine", warmup_steps=10), peak=1e-3, step=0, steps=100)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from jobs.training.config import ConstantSchedule, CosineSchedule, LinearSchedule


def learning_rate(
    schedule: ConstantSchedule | CosineSchedule | LinearSchedule,
    *,
    peak: float,
    step: int,
    steps: int,
) -> float:
    """Rate used in `step` (from 0) of `steps`; the last warm-up step reaches the peak."""
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    progress = (step - schedule.warmup_steps) / max(1, steps - 1 - schedule.warmup_steps)
    return peak * _FACTORS[schedule.kind](schedule, min(1.0, progress))


def _cosine(schedule: CosineSchedule, progress: float) -> float:
    share = 0.5 * (1 + math.cos(math.pi * progress))
    return schedule.final_ratio + (1 - schedule.final_ratio) * share


def _linear(schedule: LinearSchedule, progress: float) -> float:
    return 1 - (1 - schedule.final_ratio) * progress


_FACTORS: dict[str, Callable[[Any, float], float]] = {
    "constant": lambda _schedule, _progress: 1.0,
    "cosine": _cosine,
    "linear": _linear,
}
