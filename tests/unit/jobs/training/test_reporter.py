"""The live line, and what is logged."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.training.events import Evaluated, Event, Fault, Notice, Progress, Saved, Started
from jobs.training.reporter import Reporter, format_duration
from jobs.training.speed import SpeedMeter


class Listener:
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.reporter = Reporter(
            steps=600, units_per_step=1000, log_metrics=self.log, say=self.lines.append
        )

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.logged.append((step, metrics))


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (
            Started(5_163_552, 2, "cpu", "tokens", 0),
            "training 5,163,552 parameters on 2 workers (cpu)",
        ),
        (
            Progress(20, 6.25, 3e-4, 8000.0),
            "step  20/600  loss 6.2500  lr 3.00e-04  8,000 units/s  ETA 1:12",
        ),
        (
            Evaluated(20, "test", {"loss": 0.5, "f1": 0.25}),
            "test at step 20: loss 0.5000  f1 0.2500",
        ),
        (Saved(20, 82_700_000, 0.13), "checkpoint at step 20: 82.7 MB in 0.1 s"),
        (Notice("something"), "warning: something"),
        (
            Fault(20, "worker_lost", "worker 1 was killed; replacing it"),
            "worker_lost at step 20: worker 1 was killed; replacing it",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_each_event_is_one_line(event: Event, line: str) -> None:
    listener = Listener()
    listener.reporter(event)
    assert listener.lines == [line]


def test_a_resumed_run_says_from_where() -> None:
    listener = Listener()
    listener.reporter(Started(1, 1, "cpu", "tokens", 300))
    assert listener.lines[1] == "resumed from the checkpoint at step 300"


def test_metrics_are_named_by_split_and_unit() -> None:
    listener = Listener()
    for event in (
        Started(1, 1, "cpu", "tokens", 0),
        Progress(10, 2.0, 0.1, 5.0),
        Evaluated(10, "validation", {"loss": 3.0}),
    ):
        listener.reporter(event)
    logged: dict[str, Any] = {k: v for _, metrics in listener.logged for k, v in metrics.items()}
    assert logged == {
        "train/loss": 2.0,
        "train/learning_rate": 0.1,
        "train/tokens_per_s": 5.0,
        "validation/loss": 3.0,
    }


def test_durations() -> None:
    assert [format_duration(s) for s in (0, 47.4, 3723)] == ["0:00", "0:47", "1:02:03"]


def test_pauses_do_not_count_as_training() -> None:
    now = 0.0
    meter = SpeedMeter(100, clock=lambda: now)
    meter.count()
    now = 2.0
    with meter.paused():
        now = 10.0
    assert meter.units_per_s() == 50.0
    meter.count()
    now = 11.0
    assert meter.units_per_s() == 100.0
