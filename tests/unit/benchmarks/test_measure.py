import functools
import itertools

import pytest

from benchmarks.measure import compare, row_of
from benchmarks.report import make_report
from benchmarks.run import BENCHMARKS, main
from benchmarks.time_to_loss import Validation, first_below
from benchmarks.train_throughput import interleaved


class Clock:
    """Time that only work moves."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def work(self, seconds: float) -> None:
        self.now_s += seconds


def test_a_ratio_is_of_ours_over_the_peers_and_judged_by_its_goal() -> None:
    clock = Clock()
    ours = itertools.cycle([2.0, 4.0, 6.0])
    row = compare(
        "work",
        ours=lambda: clock.work(next(ours)),
        peer=lambda: clock.work(2.0),
        peer_name="less work",
        at_most=1.5,
        pairs=9,
        clock=clock,
    )
    assert (row.ours, row.peer, row.ratio) == (4.0, 2.0, 2.0)
    assert (row.ratio_low, row.ratio_high) == (1.0, 3.0)
    assert row.met is False


def test_a_report_names_the_machine_and_the_versions() -> None:
    report = make_report("nothing", ())
    assert "cores" in report.machine
    assert {"python", "torch", "ray"} <= report.versions.keys()


def test_an_unknown_benchmark_is_one_line_that_lists_the_known_ones(capsys) -> None:
    assert main(["nothing-like-it"]) == 2
    printed = capsys.readouterr().err
    assert all(name in printed for name in BENCHMARKS)


def test_a_row_of_speeds_has_a_goal_from_below() -> None:
    row = row_of(
        "tokens/s", pairs=[(2.6, 2.0), (3.9, 3.0), (5.2, 4.0)], peer_name="a loop", at_least=1.25
    )
    assert (row.ours, row.peer, row.goal, row.met) == (3.9, 3.0, ">= 1.25", True)
    assert row.ratio == pytest.approx(1.3)


def test_rounds_run_every_arm_once_and_begin_with_another_each_time() -> None:
    order: list[str] = []

    def arm(name: str) -> float:
        order.append(name)
        return float(len(order))

    arms = {name: functools.partial(arm, name) for name in "abc"}
    assert interleaved(arms, rounds=3) == {"a": [1, 6, 8], "b": [2, 4, 9], "c": [3, 5, 7]}
    assert "".join(order) == "abcbcacab"


def test_time_to_loss_is_the_first_validation_low_enough() -> None:
    found = [Validation(5.0, 100, 2.1), Validation(9.0, 200, 1.88), Validation(12.0, 300, 1.8)]
    assert first_below(found, 1.886) == 9.0
    with pytest.raises(RuntimeError, match=r"never 1\.5 or less"):
        first_below(found, 1.5)
