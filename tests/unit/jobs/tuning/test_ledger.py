"""What has ended is known after any kill, and the best is found among what finished."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.errors import ConflictError, InputError
from jobs.tuning.ledger import Ledger, SweepState, TrialRecord, find_best
from jobs.tuning.plan import Plan, make_plan
from jobs.tuning.table import trial_table
from tests.unit.jobs.tuning.conftest import MakeSweep


@pytest.fixture
def plan(make_sweep: MakeSweep) -> Plan:
    return make_plan(make_sweep())


def finished(loss: float) -> TrialRecord:
    return TrialRecord(status="finished", step=20, metrics={"validation/loss": loss}, seconds=61.2)


FAILED = TrialRecord(status="failed", step=5, error="the loss is nan at step 7")
STOPPED = TrialRecord(status="stopped", step=5, metrics={"validation/loss": 0.1})


def test_ended_trials_are_there_for_the_next_driver(plan: Plan, tmp_path: Path) -> None:
    with Ledger.of(plan, tmp_path).locked() as ledger:
        ledger.begin("auto")
        ledger.write(SweepState(tracking_run_id="abc"))
        ledger.record(plan.trials[1].identity, finished(0.5))
        ledger.record(plan.trials[0].identity, FAILED)
    state = Ledger.of(plan, tmp_path).begin("auto")
    assert state.tracking_run_id == "abc"
    assert state.trials == {
        plan.trials[1].identity: finished(0.5),
        plan.trials[0].identity: FAILED,
    }
    assert Ledger.of(plan, tmp_path).begin("never") == SweepState()


@pytest.mark.parametrize("damage", ["", "{", '{"result": {}}', '{"from_a_newer_release": 1}'])
def test_a_damaged_ledger_is_not_begun_anew_unless_told(
    plan: Plan, tmp_path: Path, damage: str
) -> None:
    ledger = Ledger.of(plan, tmp_path)
    ledger.path.mkdir(parents=True)
    file = ledger.path / "sweep.json"
    file.write_text(damage)
    with pytest.raises(InputError, match=r"sweep\.json is damaged.*resume=never") as caught:
        ledger.begin("auto")
    assert "\n" not in str(caught.value)
    assert file.read_text() == damage
    assert ledger.begin("never") == SweepState()


def test_two_drivers_exclude_each_other(plan: Plan, tmp_path: Path) -> None:
    with (
        Ledger.of(plan, tmp_path).locked(),
        pytest.raises(ConflictError, match="driven by another process"),
        Ledger.of(plan, tmp_path).locked(),
    ):
        pass


def test_the_best_has_finished(plan: Plan, make_sweep: MakeSweep) -> None:
    one, two, three = (trial.identity for trial in plan.trials)
    assert find_best(plan, SweepState(trials={one: FAILED, two: STOPPED})) is None
    state = SweepState(trials={one: STOPPED, two: finished(0.5), three: finished(0.5)})
    assert find_best(plan, state) == 1
    highest = Plan(make_sweep(mode="max"), plan.trials)
    state = SweepState(trials={one: finished(0.2), two: finished(0.5), three: FAILED})
    assert (find_best(plan, state), find_best(highest, state)) == (0, 1)


def test_the_table_lists_the_best_first_and_says_why_trials_failed(plan: Plan) -> None:
    one, two, three = (trial.identity for trial in plan.trials)
    state = SweepState(trials={one: FAILED, two: finished(0.5), three: finished(0.25)})
    lines = list(trial_table(plan, state))
    assert lines[0].split() == [
        "trial", "status", "step", "validation/loss", "time", "optimizer.learning_rate",
    ]  # fmt: skip
    assert lines[1].split()[:5] == ["3", "finished", "20", "0.2500", "1:01"]
    assert [line.split()[0] for line in lines[2:4]] == ["2", "1"]
    assert lines[4] == "trial 1 failed: the loss is nan at step 7"
