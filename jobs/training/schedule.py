"""Learning-rate schedules: pure functions of the step, so resuming needs no schedule state.

What depends on measurements, reducing on a plateau, is `jobs.training.monitor`'s; here it is the
peak.

learning_rate(CosineSchedule(kind="cosine", warmup_steps=10), peak=1e-3, step=0, steps=100)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from jobs.training.config import CosineSchedule, LinearSchedule, ScheduleConfig, WsdSchedule


def learning_rate(schedule: ScheduleConfig, *, peak: float, step: int, steps: int) -> float:
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


def _wsd(schedule: WsdSchedule, progress: float) -> float:
    decayed = max(0.0, 1 - (1 - progress) / schedule.decay_share)
    return 1 - (1 - schedule.final_ratio) * decayed


def _peak(_schedule: object, _progress: float) -> float:
    return 1.0


_FACTORS: dict[str, Callable[[Any, float], float]] = {
    "constant": _peak,
    "cosine": _cosine,
    "linear": _linear,
    "wsd": _wsd,
    "reduce_on_plateau": _peak,
}
