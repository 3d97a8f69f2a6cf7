"""Where the seconds of training go: data, forward, backward, step (of the optimizer), checkpoint,
evaluate; a pipeline's forward, backward and step are one.

On a CPU they are those of a clock. A GPU works on while Python goes ahead, so there each part of a
step is bracketed by two events on the GPU's stream, which cost microseconds and are read when the
seconds are asked for; data, checkpoints and evaluations are what Python itself waits for.

    clock = Stopwatch(device)
    with clock.measure("forward"):
        ...
    clock.take()      # {'forward': 0.31}
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Literal

import torch

Part = Literal["data", "forward", "backward", "step", "pipeline", "checkpoint", "evaluate"]
_ON_DEVICE = frozenset({"forward", "backward", "step", "pipeline"})


class Stopwatch:
    """Seconds by part since they were last taken."""

    def __init__(
        self,
        device: torch.device = torch.device("cpu"),  # noqa: B008 - a constant
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._is_cuda = device.type == "cuda"
        self._clock = clock
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[Part, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def measure(self, part: Part) -> Iterator[None]:
        if self._is_cuda and part in _ON_DEVICE:
            begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            begin.record()
            yield
            end.record()
            self._events.append((part, begin, end))
            return
        began_at = self._clock()
        try:
            yield
        finally:
            self._seconds[part] += self._clock() - began_at

    def take(self) -> dict[str, float]:
        """What was measured since the last call; waits for the GPU, once."""
        if self._events:
            torch.cuda.synchronize()
        for part, begin, end in self._events:
            self._seconds[part] += begin.elapsed_time(end) / 1000
        self._events.clear()
        taken, self._seconds = dict(self._seconds), defaultdict(float)
        return taken
