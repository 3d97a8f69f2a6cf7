"""The driver's ears: what workers tell becomes a live line and logged metrics.

It knows nothing of training; it gets events, a printer and somewhere to log metrics.

    reporter = Reporter(steps=600, units_per_step=1024, log_metrics=tracker.log_metrics)
    reporter(Progress(step=10, loss=6.2, learning_rate=1e-3, units_per_s=8100.0))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jobs.training.events import (
    Decided,
    Evaluated,
    Event,
    Fault,
    Notice,
    Progress,
    Quarantined,
    Saved,
    Started,
)
from jobs.training.goodput import Goodput

LogMetrics = Callable[[dict[str, float], int], None]
LogDict = Callable[[dict[str, Any], str], None]
LogFault = Callable[[Fault], None]


def say(text: str) -> None:
    """One line on standard output, at once, so that whoever follows the job sees it."""
    print(text, flush=True)


class Reporter:
    """A sink of events, at the driver."""

    def __init__(
        self,
        *,
        steps: int,
        units_per_step: int,
        log_metrics: LogMetrics,
        log_dict: LogDict = lambda _values, _name: None,
        log_fault: LogFault = lambda _fault: None,
        goodput: Goodput | None = None,
        say: Callable[[str], None] = say,
    ) -> None:
        self._steps = steps
        self._units_per_step = units_per_step
        self._log_metrics = log_metrics
        self._log_dict = log_dict
        self._log_fault = log_fault
        self._goodput = goodput
        self._say = say
        self._unit = "units"

    def __call__(self, event: Event) -> None:
        if self._goodput is not None:
            self._goodput.observe(event)
        self._handlers[type(event)](self, event)

    def _started(self, event: Started) -> None:
        self._unit = event.unit
        workers = f"{event.world_size} worker" + ("s" if event.world_size > 1 else "")
        self._say(f"training {event.num_parameters:,} parameters on {workers} ({event.device})")
        if event.first_step:
            self._say(f"resumed from the checkpoint at step {event.first_step}")

    def _progress(self, event: Progress) -> None:
        remaining_s = 0.0
        if event.units_per_s:
            remaining_s = (self._steps - event.step) * self._units_per_step / event.units_per_s
        width = len(str(self._steps))
        self._say(
            f"step {event.step:>{width}}/{self._steps}  loss {event.loss:.4f}"
            f"  lr {event.learning_rate:.2e}  {event.units_per_s:,.0f} {self._unit}/s"
            f"{'' if event.mfu is None else f'  MFU {event.mfu:.0%}'}"
            f"  ETA {format_duration(remaining_s)}"
        )
        self._log_metrics(self._metrics_of(event), event.step)

    def _metrics_of(self, event: Progress) -> dict[str, float]:
        measured = {
            "train/loss": event.loss,
            "train/learning_rate": event.learning_rate,
            f"train/{self._unit}_per_s": event.units_per_s,
            "train/gradient_norm": event.gradient_norm,
            "train/mfu": event.mfu,
            "memory/peak_bytes": event.memory_bytes or None,
            "train/goodput": None if self._goodput is None else self._goodput.share(),
            **{f"seconds/{part}": seconds for part, seconds in event.seconds.items()},
        }
        return {name: value for name, value in measured.items() if value is not None}

    def _evaluated(self, event: Evaluated) -> None:
        shown = "  ".join(f"{name} {value:.4f}" for name, value in event.metrics.items())
        self._say(f"{event.split} at step {event.step}: {shown}")
        metrics = {f"{event.split}/{name}": value for name, value in event.metrics.items()}
        self._log_metrics(metrics, event.step)

    def _decided(self, event: Decided) -> None:
        self._say(f"step {event.step}: {event.text}")

    def _saved(self, event: Saved) -> None:
        self._say(
            f"checkpoint at step {event.step}: {event.size_bytes / 1e6:,.1f} MB"
            f" in {event.seconds:.1f} s"
        )
        self._log_metrics({"checkpoint/seconds": event.seconds}, event.step)

    def _notice(self, event: Notice) -> None:
        self._say(f"warning: {event.text}")

    def _quarantined(self, event: Quarantined) -> None:
        values = {"step": event.step, "rows": list(event.rows), "reason": event.reason}
        self._log_dict(values, "quarantine.json")

    def _fault(self, event: Fault) -> None:
        self._say(f"{event.kind} at step {event.step}: {event.text}")
        self._log_fault(event)

    _handlers: dict[type, Callable[[Reporter, Any], None]] = {  # noqa: RUF012 - a constant table
        Started: _started,
        Progress: _progress,
        Evaluated: _evaluated,
        Decided: _decided,
        Saved: _saved,
        Notice: _notice,
        Fault: _fault,
        Quarantined: _quarantined,
    }


def format_duration(seconds: float) -> str:
    """'0:47', '1:02:03'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
