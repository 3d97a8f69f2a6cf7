"""Steps that may be kept: what the recovery policy decides, done.

A step gone wrong is not passed on. Training goes back to the last checkpoint and comes, through the
same rows, to the same weights before that step; there every row's own loss is measured, those at
fault are quarantined, and the step is taken without them. It knows nothing of engines.

    healer = Healer(policy, actions, tell, micro_batch_size=4, max_quarantined=32)
    for step in healer.steps(first_step=0):
        ...                                    # log, evaluate, checkpoint with healer.remember(…)
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import Protocol

from cluster.errors import JobFailedError
from jobs.training.events import Fault, FaultKind, Quarantined, Sink
from jobs.training.loop import Step
from jobs.training.memory import RunMemory
from jobs.training.recovery import (
    RecoveryDecision,
    RecoveryPolicy,
    RecoveryState,
    RowsSeen,
    StepSeen,
)

Masked = Callable[[int], frozenset[int]]


class Actions(Protocol):
    """What a worker can do about a step; all workers do it together. Steps are counted by those
    already done."""

    def take_steps(self, first_step: int, masked: Masked) -> Iterator[Step]:
        """Steps from there to the last; `masked` is asked for quarantined rows before each."""

    def look_into(self, step: int, masked: frozenset[int]) -> tuple[list[int], list[float]]:
        """Row ids of a step, and the own loss of each."""

    def go_back(self) -> int:
        """Return to the newest checkpoint, or to the beginning, and tell its step; `recall` has
        been given what that checkpoint remembers."""


class Healer:
    """See the module's first lines."""

    def __init__(
        self,
        policy: RecoveryPolicy,
        actions: Actions,
        tell: Sink,
        *,
        micro_batch_size: int,
        max_quarantined: int,
    ) -> None:
        self._policy, self._actions, self._tell = policy, actions, tell
        self._micro_batch_size, self._max_quarantined = micro_batch_size, max_quarantined
        self._state = RecoveryState()
        self.quarantine: frozenset[int] = frozenset()

    def remember(self, memory: RunMemory) -> RunMemory:
        """Add to a checkpoint's memory what a resumed run must know."""
        found = {"recovery": self._state, "quarantine": tuple(sorted(self.quarantine))}
        return memory.model_copy(update=found)

    def recall(self, memory: RunMemory) -> None:
        self._state = memory.recovery
        self.quarantine = frozenset(memory.quarantine)

    def steps(self, first_step: int) -> Iterator[Step]:
        """Raises JobFailedError if going back does not help."""
        position: int | None = first_step
        while position is not None:
            position = yield from self._until_a_fault(position)

    def _until_a_fault(self, first_step: int) -> Generator[Step, None, int | None]:
        """Yields the steps to keep; returns where to go on from, or None at the end."""
        for step in self._actions.take_steps(first_step, self._masked):
            seen = StepSeen(step.number, step.loss, step.gradient_norm)
            decision = self._policy.decide(self._state, seen)
            if decision.action != "go_on":
                break
            self._state = decision.state
            yield step
        else:
            return None
        self._end_if_hopeless(decision)
        return self._go_back(decision, step.number)

    def _go_back(self, decision: RecoveryDecision, number: int) -> int:
        suspect, quarantine = decision.state.suspect, self.quarantine
        assert suspect is not None, "going back has a reason"
        position = self._actions.go_back()
        # The checkpoint knows nothing of what was found after it.
        self.quarantine |= quarantine
        self._state = self._state.model_copy(
            update={
                "suspect": suspect,
                "rollbacks": decision.state.rollbacks,
                "num_accepted": decision.state.num_accepted,
            }
        )
        where = f"the checkpoint at step {position}" if position else "the beginning"
        self._report(number, suspect.problem, f"{decision.reason}; back to {where}")
        return position

    def _masked(self, step: int) -> frozenset[int]:
        suspect = self._state.suspect
        if suspect is not None and suspect.step == step + 1:
            self._look_into(step)
        return self.quarantine

    def _look_into(self, step: int) -> None:
        ids, losses = self._actions.look_into(step, self.quarantine)
        decision = self._policy.decide(
            self._state,
            RowsSeen(
                step=step + 1,
                ids=ids,
                losses=losses,
                micro_batch_size=self._micro_batch_size,
                quarantine=self.quarantine,
                max_quarantined=self._max_quarantined,
            ),
        )
        self._end_if_hopeless(decision)
        self._state = decision.state
        if decision.action == "accept":
            self._report(step + 1, "loss_spike", f"{decision.reason}; going on")
            return
        self.quarantine |= set(decision.rows)
        shown = ", ".join(map(str, decision.rows))
        self._report(step + 1, "quarantined", f"rows {shown} are masked: {decision.reason}")
        self._tell(Quarantined(step + 1, tuple(sorted(self.quarantine)), decision.reason))

    def _report(self, step: int, kind: FaultKind, text: str) -> None:
        self._tell(Fault(step, kind, text))

    def _end_if_hopeless(self, decision: RecoveryDecision) -> None:
        if decision.action == "give_up":
            raise JobFailedError(
                decision.reason,
                hint="lower optimizer.learning_rate, lengthen schedule.warmup_steps or look at the "
                "data",
            )
