"""What to do about a step that went wrong: go back, quarantine the rows at fault, or give up.

Pure: a frozen state and what was seen give a decision and its reason. The state is part of every
checkpoint. It knows nothing of engines, workers or files.

A loss that is no number is wrong at once. A spike is a loss above all of: `spike_factor` times the
median of the last committed losses, the median plus `spike_deviations` robust standard deviations
(1.4826 times the median absolute deviation: Rousseeuw and Croux, 1993), and the median plus
`spike_rise`. With normal noise, ten deviations come up by chance once in 1e23 steps. Real losses
have heavier tails, and one hard example in a well-fitted batch is many deviations but harmless:
hence the other two conditions, which a handful of hard examples do not meet. What is missed costs
little, since gradients are clipped; a false alarm costs the way back and a few rows.

    decision = RecoveryPolicy(config.recovery).decide(state, StepSeen(step=7, loss=math.nan))
    decision.action, decision.reason      # 'roll_back', 'the loss is nan at step 7'
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.config import StrictModel
from jobs.training.config import RecoveryConfig

_SIGMA_PER_MAD = 1.4826
Problem = Literal["loss_not_finite", "loss_spike"]
Action = Literal["go_on", "roll_back", "quarantine", "accept", "give_up"]


class Suspect(StrictModel):
    """A step that went wrong, to be looked into when it comes up again."""

    step: int
    problem: Problem
    limit: float | None = None
    """Own loss above which a row is at fault; None means only those without a number."""


class RecoveryState(StrictModel):
    """What decisions depend on."""

    losses: tuple[float, ...] = ()
    """Of the last committed steps."""
    suspect: Suspect | None = None
    rollbacks: tuple[tuple[int, int], ...] = ()
    """Steps that were gone back from, and how often."""
    num_accepted: int = 0
    """Spikes that no row was to blame for."""

    def num_rollbacks(self, step: int) -> int:
        return dict(self.rollbacks).get(step, 0)


@dataclass(frozen=True)
class StepSeen:
    """A step as it was taken, before anything is made of it."""

    step: int
    loss: float
    gradient_norm: float | None = None
    """None if it is not known."""


@dataclass(frozen=True)
class RowsSeen:
    """The rows of a suspect step, with the weights that it began with."""

    step: int
    ids: Sequence[int]
    losses: Sequence[float]
    micro_batch_size: int
    quarantine: frozenset[int]
    """Rows that have been masked already."""
    max_quarantined: int


@dataclass(frozen=True)
class RecoveryDecision:
    action: Action
    reason: str
    state: RecoveryState
    rows: tuple[int, ...] = ()
    """What to quarantine, in addition."""


class RecoveryPolicy:
    """See the module's first lines."""

    def __init__(self, config: RecoveryConfig) -> None:
        self._config = config

    def decide(self, state: RecoveryState, seen: StepSeen | RowsSeen) -> RecoveryDecision:
        if isinstance(seen, StepSeen):
            return self._judge_step(state, seen)
        return self._judge_rows(state, seen)

    def spike_limit(self, state: RecoveryState) -> float | None:
        """The loss above which a step is a spike; None while too little is known."""
        config, losses = self._config, state.losses
        if len(losses) < config.first_steps or state.num_accepted >= config.max_rollbacks:
            return None
        median = statistics.median(losses)
        deviation = _SIGMA_PER_MAD * statistics.median(abs(loss - median) for loss in losses)
        return max(
            median * config.spike_factor,
            median + config.spike_deviations * deviation,
            median + config.spike_rise,
        )

    def _judge_step(self, state: RecoveryState, seen: StepSeen) -> RecoveryDecision:
        limit = self.spike_limit(state)
        found = _problem(seen, limit)
        if found is None:
            return RecoveryDecision("go_on", "", self._committed(state, seen))
        problem, reason = found
        times = state.num_rollbacks(seen.step)
        if times >= self._config.max_rollbacks:
            tried = f", after going back {times} times" if times else ""
            return RecoveryDecision("give_up", f"{reason}{tried}", state)
        suspect = Suspect(
            step=seen.step, problem=problem, limit=limit if problem == "loss_spike" else None
        )
        rollbacks = {**dict(state.rollbacks), seen.step: times + 1}
        after = state.model_copy(
            update={"suspect": suspect, "rollbacks": tuple(sorted(rollbacks.items()))}
        )
        return RecoveryDecision("roll_back", reason, after)

    def _committed(self, state: RecoveryState, seen: StepSeen) -> RecoveryState:
        losses = (*state.losses, seen.loss)[-self._config.window_steps :]
        suspect = state.suspect
        if suspect is not None and suspect.step <= seen.step:
            suspect = None
        return state.model_copy(update={"losses": losses, "suspect": suspect})

    def _judge_rows(self, state: RecoveryState, seen: RowsSeen) -> RecoveryDecision:
        suspect = state.suspect
        assert suspect is not None, "only a suspect step's rows are looked into"
        places = [place for place, id_ in enumerate(seen.ids) if id_ not in seen.quarantine]
        guilty = [place for place in places if _is_guilty(seen.losses[place], suspect.limit)]
        if guilty and len(guilty) == len(places) > 1:
            return self._blame_the_model(state, suspect, len(places))
        reason = "their own loss is " + (
            "no number" if suspect.limit is None else f"no number or above {suspect.limit:.4g}"
        )
        if not guilty:
            guilty = _worst_micro_batch(seen, places)
            reason = "no row stands out by its own loss, and this is the worst micro-batch"
        rows = tuple(sorted({int(seen.ids[place]) for place in guilty}))
        return _within_limit(state, seen, rows, reason)

    def _blame_the_model(
        self, state: RecoveryState, suspect: Suspect, num_rows: int
    ) -> RecoveryDecision:
        if suspect.problem == "loss_not_finite":
            return RecoveryDecision(
                "give_up",
                f"the loss is nan at step {suspect.step} for all of its {num_rows} rows, so the "
                "model has diverged",
                state,
            )
        after = state.model_copy(
            update={"losses": (), "suspect": None, "num_accepted": state.num_accepted + 1}
        )
        return RecoveryDecision(
            "accept",
            f"all {num_rows} rows of step {suspect.step} have a loss above {suspect.limit:.4g}, "
            "so none is to blame",
            after,
        )


def _problem(seen: StepSeen, limit: float | None) -> tuple[Problem, str] | None:
    if not math.isfinite(seen.loss):
        return "loss_not_finite", f"the loss is {seen.loss} at step {seen.step}"
    if seen.gradient_norm is not None and not math.isfinite(seen.gradient_norm):
        return "loss_not_finite", f"the gradient is no number at step {seen.step}"
    if limit is not None and seen.loss > limit:
        return (
            "loss_spike",
            f"the loss is {seen.loss:.4g} at step {seen.step}, above {limit:.4g}",
        )
    return None


def _is_guilty(loss: float, limit: float | None) -> bool:
    return not math.isfinite(loss) or (limit is not None and loss > limit)


def _worst_micro_batch(seen: RowsSeen, places: Sequence[int]) -> list[int]:
    """The places of the micro-batch with the highest mean loss; micro-batches are consecutive."""
    groups: dict[int, list[int]] = {}
    for place in places:
        groups.setdefault(place // seen.micro_batch_size, []).append(place)
    return max(
        groups.values(),
        key=lambda group: statistics.fmean(seen.losses[place] for place in group),
        default=[],
    )


def _within_limit(
    state: RecoveryState, seen: RowsSeen, rows: tuple[int, ...], reason: str
) -> RecoveryDecision:
    total = len(seen.quarantine | set(rows))
    if not rows or total > seen.max_quarantined:
        return RecoveryDecision(
            "give_up",
            f"step {seen.step} would make {total} quarantined rows, and "
            f"{seen.max_quarantined} are allowed",
            state,
        )
    return RecoveryDecision("quarantine", reason, state, rows)
