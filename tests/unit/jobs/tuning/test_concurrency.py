"""As many trials at a time as have room for all their workers."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.errors import MachineError
from jobs.tuning.concurrency import Capacity, num_concurrent
from jobs.tuning.plan import Plan, make_plan
from tests.unit.jobs.tuning.conftest import MakeSweep


def plan_of(make_sweep: MakeSweep, num_workers: int, **values: Any) -> Plan:
    return make_plan(make_sweep(overrides={"num_workers": num_workers}, **values))


@pytest.mark.parametrize(
    ("num_workers", "capacity", "expected"),
    [
        (2, Capacity(2), 1),
        (1, Capacity(2), 2),
        (2, Capacity(5), 2),
        (1, Capacity(64), 3),
        (2, Capacity(64, num_gpus=2), 1),
        (2, Capacity(64, num_gpus=1), 3),
    ],
)
def test_derived_from_what_a_trial_needs(
    make_sweep: MakeSweep, num_workers: int, capacity: Capacity, expected: int
) -> None:
    assert num_concurrent(plan_of(make_sweep, num_workers), capacity) == expected


def test_the_largest_trial_decides(make_sweep: MakeSweep) -> None:
    space = {"num_workers": {"grid": [1, 2, 4]}}
    plan = make_plan(make_sweep(space=space, search="grid"))
    assert num_concurrent(plan, Capacity(4)) == 1
    with pytest.raises(MachineError, match="num_workers is 4, and there are 2 CPUs"):
        num_concurrent(plan, Capacity(2))


def test_a_smaller_number_is_kept_and_a_larger_one_refused(make_sweep: MakeSweep) -> None:
    assert num_concurrent(plan_of(make_sweep, 1, max_concurrent=1), Capacity(4)) == 1
    with pytest.raises(MachineError, match="max_concurrent is 3, and there is room for 2"):
        num_concurrent(plan_of(make_sweep, 2, max_concurrent=3), Capacity(4))
