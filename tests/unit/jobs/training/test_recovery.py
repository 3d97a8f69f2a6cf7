"""What the recovery policy decides, over simulated histories."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from jobs.training.config import RecoveryConfig
from jobs.training.recovery import (
    RecoveryDecision,
    RecoveryPolicy,
    RecoveryState,
    RowsSeen,
    StepSeen,
    Suspect,
)

CONFIG = RecoveryConfig(first_steps=8, window_steps=16)
POLICY = RecoveryPolicy(CONFIG)
CALM = RecoveryState(losses=(2.0, 2.1, 1.9, 2.0, 2.2, 2.0, 1.8, 2.0))


def see(state: RecoveryState, loss: float, **values: Any) -> RecoveryDecision:
    return POLICY.decide(state, StepSeen(**{"step": 9, "loss": loss, **values}))


@pytest.mark.parametrize(
    ("loss", "values", "action", "reason"),
    [
        (2.1, {}, "go_on", ""),
        (2.9, {}, "go_on", ""),
        (2.99, {"gradient_norm": 40.0}, "go_on", ""),
        (3.6, {}, "roll_back", "the loss is 3.6 at step 9, above 3"),
        (math.nan, {}, "roll_back", "the loss is nan at step 9"),
        (math.inf, {}, "roll_back", "the loss is inf at step 9"),
        (2.0, {"gradient_norm": math.inf}, "roll_back", "the gradient is no number at step 9"),
    ],
)
def test_a_step_is_kept_unless_it_is_no_number_or_a_spike(
    loss: float, values: dict[str, Any], action: str, reason: str
) -> None:
    decision = see(CALM, loss, **values)
    assert (decision.action, decision.reason) == (action, reason)


def test_no_early_step_is_a_spike_but_no_number_is_wrong_at_once() -> None:
    early = RecoveryState(losses=CALM.losses[:7])
    assert see(early, 1e6).action == "go_on"
    assert see(early, math.nan).action == "roll_back"


@pytest.mark.parametrize("field", ["spike_factor", "spike_deviations", "spike_rise"])
def test_a_spike_meets_all_three_conditions(field: str) -> None:
    stricter = RecoveryPolicy(CONFIG.model_copy(update={field: 1000.0}))
    assert POLICY.decide(CALM, StepSeen(9, 10.0)).action == "roll_back"
    assert stricter.decide(CALM, StepSeen(9, 10.0)).action == "go_on"


def test_noise_trends_and_hard_examples_are_no_spikes() -> None:
    # Each history is drawn with its own seed: nothing here fails by chance.
    histories = {
        "noise": lambda step, draw: 2 + draw.gauss(0, 0.3),
        "falling": lambda step, draw: 6 * 0.99**step + draw.gauss(0, 0.1),
        "rising": lambda step, draw: 1 + 0.01 * step + draw.gauss(0, 0.05),
        "well fitted, with one hard example in 16 now and then": lambda step, draw: (
            0.01 + (draw.random() < 0.05) * draw.uniform(1, 12) / 16
        ),
        "heavy tails": lambda step, draw: draw.lognormvariate(0, 0.4),
    }
    for name, loss_at in histories.items():
        policy, state, draw = RecoveryPolicy(RecoveryConfig()), RecoveryState(), random.Random(7)
        for step in range(1, 1001):
            decision = policy.decide(state, StepSeen(step, loss_at(step, draw)))
            assert decision.action == "go_on", f"{name}: {decision.reason}"
            state = decision.state


def test_only_committed_losses_are_remembered_and_only_the_last() -> None:
    state = CALM
    for step in range(9, 29):
        state = POLICY.decide(state, StepSeen(step, float(step) / 10)).state
    assert state.losses == tuple(step / 10 for step in range(13, 29))
    assert see(state, math.nan).state.losses == state.losses


def test_a_step_that_was_suspect_and_is_kept_is_suspect_no_more() -> None:
    state = see(CALM, math.nan).state
    assert state.suspect == Suspect(step=9, problem="loss_not_finite")
    assert see(state, 2.0, step=8).state.suspect == state.suspect
    assert see(state, 2.0, step=9).state.suspect is None


def test_going_back_from_the_same_step_ends_after_max_rollbacks() -> None:
    state = CALM
    for _ in range(CONFIG.max_rollbacks):
        state = see(state, math.nan).state
    hopeless = see(state, math.nan)
    assert hopeless.action == "give_up"
    assert hopeless.reason == "the loss is nan at step 9, after going back 3 times"
    assert see(state, math.nan, step=10).action == "roll_back"


def test_without_rollbacks_the_first_loss_that_is_no_number_ends_the_run() -> None:
    policy = RecoveryPolicy(CONFIG.model_copy(update={"max_rollbacks": 0}))
    decision = policy.decide(CALM, StepSeen(9, math.nan))
    assert (decision.action, decision.reason) == ("give_up", "the loss is nan at step 9")


def look(limit: float | None, losses: list[float], **values: Any) -> RecoveryDecision:
    problem = "loss_not_finite" if limit is None else "loss_spike"
    suspect = Suspect(step=9, problem=problem, limit=limit)
    seen: dict[str, Any] = {
        "step": 9,
        "ids": [100 + place for place in range(len(losses))],
        "losses": losses,
        "micro_batch_size": 2,
        "quarantine": frozenset(),
        "max_quarantined": 4,
    }
    state = CALM.model_copy(update={"suspect": suspect})
    return POLICY.decide(state, RowsSeen(**{**seen, **values}))


@pytest.mark.parametrize(
    ("limit", "losses", "values", "rows"),
    [
        pytest.param(None, [2.0, math.nan, 2.0, 2.0], {}, (101,), id="no number"),
        pytest.param(None, [2.0, 9.0, 2.0, math.inf], {}, (103,), id="high is not infinite"),
        pytest.param(4.0, [2.0, 9.0, 2.0, math.nan], {}, (101, 103), id="beyond the limit"),
        pytest.param(4.0, [2.0, 3.0, 3.5, 3.9], {}, (102, 103), id="the worst micro-batch"),
        pytest.param(
            4.0,
            [2.0, 3.0, 3.5, 3.9],
            {"quarantine": frozenset({102, 103})},
            (100, 101),
            id="masked rows are not looked at",
        ),
        pytest.param(None, [math.nan], {}, (100,), id="the only row"),
    ],
)
def test_rows_at_fault_are_those_of_their_own_loss_else_the_worst_micro_batch(
    limit: float | None, losses: list[float], values: dict[str, Any], rows: tuple[int, ...]
) -> None:
    decision = look(limit, losses, **values)
    assert (decision.action, decision.rows) == ("quarantine", rows)
    assert decision.reason


def test_where_every_row_is_at_fault_the_model_is() -> None:
    diverged = look(None, [math.nan] * 4)
    assert diverged.action == "give_up"
    assert "the loss is nan at step 9 for all of its 4 rows" in diverged.reason
    accepted = look(4.0, [5.0] * 4)
    assert accepted.action == "accept"
    assert accepted.rows == ()
    # Nothing is a spike until the new level is known.
    assert accepted.state.losses == ()
    assert accepted.state.suspect is None


def test_a_run_whose_spikes_no_row_is_to_blame_for_is_left_alone() -> None:
    state = CALM.model_copy(update={"num_accepted": CONFIG.max_rollbacks})
    assert see(state, 1e6).action == "go_on"
    assert see(state, math.nan).action == "roll_back"


def test_a_quarantine_that_grows_too_large_ends_the_run() -> None:
    decision = look(None, [math.nan, 2.0], quarantine=frozenset({1, 2, 3, 4}))
    assert decision.action == "give_up"
    assert decision.reason == "step 9 would make 5 quarantined rows, and 4 are allowed"
