"""How fast training goes, evaluations and checkpoints not counted, and how much of it is of use.

The first step after a start also compiles, fills caches and waits for other workers: as useful
counts only what the second one takes, once that is known.

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
    """Units (tokens, samples) per second since it was last asked.

    Args:
        useful_s: seconds of the steps that were taken, and kept, before.
    """

    def __init__(
        self,
        units_per_step: int,
        clock: Callable[[], float] = time.monotonic,
        *,
        useful_s: float = 0.0,
    ) -> None:
        self._units_per_step = units_per_step
        self._clock = clock
        self.useful_s = useful_s
        """Seconds of all steps that are part of the run."""
        self.warm_up_s = 0.0
        """What the first step took longer than the second."""
        self._num_counted = 0
        self._first_s = 0.0
        self._step_began_at = clock()
        self._restart()

    def _restart(self) -> None:
        self._num_steps = 0
        self._started_at = self._clock()
        self._paused_s = 0.0

    def count(self) -> None:
        """One more step is done."""
        self._num_steps += 1
        self._num_counted += 1
        now = self._clock()
        seconds, self._step_began_at = now - self._step_began_at, now
        if self._num_counted == 1:
            self._first_s = seconds
            return
        self.useful_s += seconds
        if self._num_counted == 2:
            self.useful_s += min(self._first_s, seconds)
            self.warm_up_s = max(self._first_s - seconds, 0.0)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        began_at = self._clock()
        try:
            yield
        finally:
            seconds = self._clock() - began_at
            self._paused_s += seconds
            self._step_began_at += seconds

    def units_per_s(self) -> float:
        """Speed since the last call."""
        seconds = self._clock() - self._started_at - self._paused_s
        units = self._num_steps * self._units_per_step
        self._restart()
        return units / seconds if seconds > 0 else 0.0
