"""How fast training goes, evaluations and checkpoints not counted.

meter = SpeedMeter(units_per_step=4096)
meter.count()
with meter.paused(): ...
meter.units_per_s()
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator


class SpeedMeter:
    """Units (tokens, samples) per second since it was last asked."""

    def __init__(self, units_per_step: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._units_per_step = units_per_step
        self._clock = clock
        self._restart()

    def _restart(self) -> None:
        self._num_steps = 0
        self._started_at = self._clock()
        self._paused_s = 0.0

    def count(self) -> None:
        """One more step is done."""
        self._num_steps += 1

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        began_at = self._clock()
        try:
            yield
        finally:
            self._paused_s += self._clock() - began_at

    def units_per_s(self) -> float:
        """Speed since the last call."""
        seconds = self._clock() - self._started_at - self._paused_s
        units = self._num_steps * self._units_per_step
        self._restart()
        return units / seconds if seconds > 0 else 0.0
