"""What a worker tells the driver while it trains. Plain data, so it crosses Ray.

sink(Progress(step=10, metrics={"train/loss": 2.3}, units_per_s=8000.0))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

FaultKind = Literal[
    "worker_lost",
    "worker_hung",
    "loss_not_finite",
    "loss_spike",
    "quarantined",
    "checkpoint_corrupt",
    "checkpoint_failed",
    "stopped",
    "resized",
]


UNKNOWN_STEP = -1
"""Step of a fault that is noticed where steps are not known."""


@dataclass(frozen=True)
class Started:
    """A worker group is ready; sent again after each recovery."""

    num_parameters: int
    world_size: int
    device: str
    unit: str
    first_step: int
    """0, or the step of the checkpoint that training goes on from."""
    useful_s: float = 0.0
    """Seconds of the steps before it."""


@dataclass(frozen=True)
class Progress:
    """Training metrics over the last interval."""

    step: int
    """Steps done."""
    loss: float
    learning_rate: float
    units_per_s: float
    """Tokens or samples per second, over all workers."""
    gradient_norm: float | None = None
    """Of the last step, before clipping; None if it is not known."""
    mfu: float | None = None
    """Share of what the devices are capable of in matrix products; None if it is not known."""
    memory_bytes: int = 0
    """At most so far, at the first worker."""
    seconds: dict[str, float] = field(default_factory=dict)
    """At the first worker, by part: data, forward, backward, step, checkpoint, evaluate."""
    useful_s: float = 0.0
    """Seconds of all steps that are part of the run, since it first began."""
    warm_up_s: float = 0.0
    """What the first step since the last start took longer than the second."""


@dataclass(frozen=True)
class Evaluated:
    """Metrics on a held-out split."""

    step: int
    split: str
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Decided:
    """What an evaluation led to, and why: one line."""

    step: int
    text: str


@dataclass(frozen=True)
class Saved:
    """A checkpoint was committed."""

    step: int
    size_bytes: int
    seconds: float
    """From when the state was copied until the checkpoint was whole."""
    blocked_s: float = 0.0
    """Of these, how long training waited."""


@dataclass(frozen=True)
class Notice:
    """Something the user should know: one line."""

    text: str


@dataclass(frozen=True)
class Fault:
    """Something went wrong, or was interfered with, and the run went on or ended in order."""

    step: int
    """Steps done when it was noticed."""
    kind: FaultKind
    text: str
    """What happened and what was done about it: one line."""


@dataclass(frozen=True)
class Quarantined:
    """Rows of the train split count no more."""

    step: int
    """The step that they made go wrong."""
    rows: tuple[int, ...]
    """All that are quarantined by now, sorted."""
    reason: str


Event = Started | Progress | Evaluated | Decided | Saved | Notice | Fault | Quarantined
Sink = Callable[[Event], None]
