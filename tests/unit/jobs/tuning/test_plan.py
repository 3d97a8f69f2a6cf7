"""A plan holds only trials that can start; all else is refused before any of them."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.errors import ConfigError, HeliostatError
from jobs.tuning.plan import make_plan
from tests.unit.jobs.tuning.conftest import TRAIN, MakeSweep


def test_trials_are_training_configs_with_their_values(make_sweep: MakeSweep) -> None:
    plan = make_plan(make_sweep(overrides={"num_workers": 1, "optimizer.name": "sgd"}))
    assert [trial.config.run_name for trial in plan.trials] == [
        "sweep-001",
        "sweep-002",
        "sweep-003",
    ]
    for trial in plan.trials:
        assert trial.config.optimizer.learning_rate == trial.values["optimizer.learning_rate"]
        assert (trial.config.optimizer.name, trial.config.num_workers) == ("sgd", 1)
        assert trial.config.experiment == "tune"
    assert len({trial.identity for trial in plan.trials}) == 3


def test_a_schedule_is_chosen_whole(make_sweep: MakeSweep) -> None:
    schedules = [{"kind": "wsd", "decay_share": 0.5}, {"kind": "reduce_on_plateau", "patience": 1}]
    plan = make_plan(make_sweep(space={"schedule": {"grid": schedules}}, search="grid"))
    kinds = [trial.config.schedule.kind for trial in plan.trials]
    assert kinds == ["wsd", "reduce_on_plateau"]


def test_an_optimizer_brings_its_own_default_decay(make_sweep: MakeSweep) -> None:
    names = ["adamw", "adagrad"]
    plan = make_plan(make_sweep(space={"optimizer.name": {"grid": names}}, search="grid"))
    assert [trial.config.optimizer.weight_decay for trial in plan.trials] == [0.1, 0.0]


def test_what_a_training_config_leaves_out_is_each_trials_own(make_sweep: MakeSweep) -> None:
    """A choice of kinds, and a ds_config that our defaults do not contradict."""
    kinds = ["constant", "wsd"]
    raw = {"gradient_clipping": 0.5, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}
    plan = make_plan(
        make_sweep(
            space={"schedule.kind": {"grid": kinds}}, search="grid", overrides={"deepspeed": raw}
        )
    )
    assert [trial.config.schedule.kind for trial in plan.trials] == kinds
    assert plan.trials[0].config.deepspeed == raw


def test_it_says_so_where_the_space_has_fewer_points_than_asked_for(make_sweep: MakeSweep) -> None:
    plan = make_plan(make_sweep(space={"seed": {"choice": [1, 2]}}, num_trials=5))
    assert len(plan.trials) == 2
    assert "num_trials is 5" in plan.shortage
    assert make_plan(make_sweep()).shortage == ""


def test_a_section_that_is_left_out_keeps_its_kind(make_sweep: MakeSweep) -> None:
    plan = make_plan(make_sweep(space={"schedule.warmup_steps": {"grid": [1, 2]}}, search="grid"))
    schedules = [trial.config.schedule for trial in plan.trials]
    assert [(each.kind, each.warmup_steps) for each in schedules] == [("cosine", 1), ("cosine", 2)]


def test_the_same_sweep_has_the_same_identity(make_sweep: MakeSweep) -> None:
    identity = make_plan(make_sweep()).identity
    assert make_plan(make_sweep(max_concurrent=1, resume="never")).identity == identity
    for changed in ({"seed": 1}, {"metric": "accuracy"}, {"overrides": {"steps": 30}}):
        assert make_plan(make_sweep(**changed)).identity != identity


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"space": {"optimizer.learning_rat": {"uniform": [0, 1]}}},
            "mean 'learning_rate'",
        ),
        (
            {
                "space": {
                    "schedule": {"choice": [{"kind": "cosine"}]},
                    "schedule.kind": {"grid": [1]},
                }
            },
            "space.schedule.kind lies inside space.schedule",
        ),
        ({"space": {"stepz": {"int": [5, 9]}}}, "unknown key 'stepz'; did you mean 'steps'"),
        ({"space": {"steps.many": {"int": [5, 9]}}}, "'steps' is a single value"),
        ({"space": {"optimizer.learning_rate": {"uniform": [-1, 1]}}}, "learning_rate: -1"),
        ({"space": {"model.dropout": {"choice": [0.1, 1.5]}}}, "model.dropout: 1.5"),
        ({"space": {"steps": {"uniform": [9.5, 20.5]}}}, "steps: 9.5"),
        ({"space": {"steps": {"choice": ["many", 9]}}}, "steps: many"),
        ({"space": {"schedule": {"choice": [{"kind": "step"}]}}}, "schedule"),
        (
            {"space": {"schedule": {"choice": [{"kind": "cosine", "warmup_steps": 99}]}}},
            "warmup_steps 99 exceeds steps 20",
        ),
        ({"space": {"batch_size": {"int": [2, 9]}}}, "batch_size: 9: batch_size 9 cannot be"),
        ({"space": {"name": {"choice": ["a", "b"]}}}, "space.name"),
        ({"space": {"data.splits.seed": {"int": [0, 5]}}}, "share the field 'data'"),
        ({"metric": "perplexity"}, "metric is 'perplexity', which model.family 'cnn' does not"),
        ({"train": "configs/train/none.yaml"}, "'configs/train/none.yaml' does not exist"),
        ({"train": {**TRAIN, "stepz": 1}}, "train: unknown key 'stepz'"),
        ({"overrides": {"stepz": 1}}, "unknown key 'stepz'"),
        ({"overrides": {"launcher": "local"}}, "trials are placed by Ray"),
        ({"scheduler": {"kind": "asha", "grace_steps": 20}}, "cannot stop a trial of 20 steps"),
        (
            {"space": {"parallelism.tensor": {"choice": [2]}}},
            "model.family 'cnn' cannot be divided",
        ),
    ],
)
def test_what_no_trial_could_run_is_one_line(
    make_sweep: MakeSweep, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(HeliostatError) as caught:
        make_plan(make_sweep(**values))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_every_end_is_tried_even_if_no_point_has_it(make_sweep: MakeSweep) -> None:
    space = {"model.dropout": {"uniform": [0.0, 1.0]}}
    with pytest.raises(ConfigError, match=r"model\.dropout: 1"):
        make_plan(make_sweep(space=space, num_trials=1))
