"""Goodput: seconds of the steps that a run consists of, as a share of all since it first began.

Each step counts once, however often it was taken; everything else counts as time only: starts,
compilation, evaluations, checkpoints, steps lost to faults, restarts, and time in which nobody
drove the run. Kept across restarts: useful seconds lie in every checkpoint, the beginning in
`run.json`.

    goodput = Goodput(began_at=state.began_at)
    goodput.observe(event)
    goodput.share(), goodput.breakdown()      # 0.91, {'useful': 0.91, 'start': 0.05, …}
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable

from jobs.training.events import Event, Progress, Saved, Started


class Goodput:
    """At the driver; `began_at` is in seconds since 1970."""

    def __init__(self, began_at: float, clock: Callable[[], float] = time.time) -> None:
        self._began_at = began_at
        self._clock = clock
        self._useful_s = 0.0
        self._warm_up_s = 0.0
        self._has_started = False
        self._spent_s: dict[str, float] = defaultdict(float)
        self._last_heard_at = clock()
        self._spent_s["before"] = self._last_heard_at - began_at

    def observe(self, event: Event) -> None:
        now = self._clock()
        if isinstance(event, Started):
            # Up to a logging interval of steps that nobody heard of is in it.
            is_first = not self._has_started and event.first_step == 0
            self._spent_s["start" if is_first else "restart"] += now - self._last_heard_at
            self._start_from(event.useful_s)
            self._settle_warm_up()
        elif isinstance(event, Progress):
            # After a bad step, workers go back by themselves.
            self._go_back_to(event.useful_s)
            self._useful_s = event.useful_s
            if event.warm_up_s < self._warm_up_s:
                self._settle_warm_up()
            self._warm_up_s = event.warm_up_s
            self._spent_s["evaluate"] += event.seconds.get("evaluate", 0.0)
        elif isinstance(event, Saved):
            self._spent_s["checkpoint"] += event.blocked_s
        self._last_heard_at = now

    def share(self) -> float:
        """From 0 to 1."""
        return self._useful_s / max(self._elapsed_s(), 1e-9)

    def breakdown(self) -> dict[str, float]:
        """Shares of all seconds since the beginning; they add up to 1.

        useful; lost: steps that were taken again; start: up to the first step of all; restart:
        likewise for what went on, from the last sign of life; warm_up: what first steps took
        longer; checkpoint, evaluate: while training waited; before: up to this driver's start, what
        was useful left out; other.
        """
        elapsed_s = max(self._elapsed_s(), 1e-9)
        spent = dict(self._spent_s)
        spent["warm_up"] = spent.get("warm_up", 0.0) + self._warm_up_s
        known = {"useful": self._useful_s, **spent}
        known["other"] = elapsed_s - sum(known.values())
        return {name: seconds / elapsed_s for name, seconds in known.items()}

    def _start_from(self, useful_s: float) -> None:
        if self._has_started:
            self._go_back_to(useful_s)
            return
        # The useful part of what was before this driver.
        self._has_started = True
        self._spent_s["before"] -= min(useful_s, self._spent_s["before"])
        self._useful_s = useful_s

    def _go_back_to(self, useful_s: float) -> None:
        if useful_s < self._useful_s:
            self._spent_s["lost"] += self._useful_s - useful_s
            self._useful_s = useful_s

    def _settle_warm_up(self) -> None:
        self._spent_s["warm_up"] += self._warm_up_s
        self._warm_up_s = 0.0

    def _elapsed_s(self) -> float:
        return self._clock() - self._began_at
