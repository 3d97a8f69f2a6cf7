"""What a worker measures of itself while it trains: speed, MFU, memory, where the seconds go.

telemetry = Telemetry(units_per_step=4096, flops_per_unit=2e8, peak_flops=3e11, group=group)
telemetry.count()
with telemetry.paused("evaluate"): ...
tell(telemetry.progress(step))
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

import torch

from jobs.training.events import Progress
from jobs.training.loop import Step
from jobs.training.matmul_peak import Precision, matmul_peak
from jobs.training.process_group import ProcessGroup
from jobs.training.speed import SpeedMeter
from jobs.training.timing import Part, Stopwatch

_KIB = 1024


class Telemetry:
    """Of one worker.

    Args:
        flops_per_unit: operations that a token takes; None leaves out MFU, as does
        peak_flops: operations per second that one worker's device is capable of.
    """

    def __init__(
        self,
        *,
        units_per_step: int,
        group: ProcessGroup,
        flops_per_unit: float | None = None,
        peak_flops: float | None = None,
    ) -> None:
        self._units_per_step = units_per_step
        self._group = group
        self._flops_per_unit, self._peak_flops = flops_per_unit, peak_flops
        self.clock = Stopwatch(group.device)
        self.restart(useful_s=0.0)

    def restart(self, *, useful_s: float) -> None:
        """Go on from a checkpoint, up to which the run had so many useful seconds."""
        self._meter = SpeedMeter(self._units_per_step, useful_s=useful_s)

    @property
    def useful_s(self) -> float:
        """Seconds of all steps that are part of the run so far."""
        return self._meter.useful_s

    def count(self) -> None:
        """One more step is done."""
        self._meter.count()

    @contextlib.contextmanager
    def paused(self, part: Part) -> Iterator[None]:
        """Something else than a step."""
        with self._meter.paused(), self.clock.measure(part):
            yield

    def progress(self, step: Step) -> Progress:
        """What there is to tell of the steps since the last call."""
        units_per_s = self._meter.units_per_s()
        return Progress(
            step=step.number,
            loss=step.loss,
            learning_rate=step.learning_rate,
            units_per_s=units_per_s,
            gradient_norm=step.gradient_norm,
            mfu=self._mfu(units_per_s),
            memory_bytes=peak_memory_bytes(self._group.device),
            seconds=self.clock.take(),
            useful_s=self._meter.useful_s,
            warm_up_s=self._meter.warm_up_s,
        )

    def _mfu(self, units_per_s: float) -> float | None:
        if self._flops_per_unit is None or self._peak_flops is None:
            return None
        capable_of = self._peak_flops * self._group.world_size
        return self._flops_per_unit * units_per_s / capable_of


def shared_peak(group: ProcessGroup, path: Path | None, precision: Precision) -> float | None:
    """The first worker's peak, measured while the others wait; all workers call it together."""
    if path is None:
        return None
    peak = matmul_peak(path, group.device, precision) if group.is_first else None
    found: float | None = group.from_first(peak)
    return found


def peak_memory_bytes(device: torch.device) -> int:
    """At most so far: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB
