import itertools

from benchmarks.measure import compare
from benchmarks.report import make_report
from benchmarks.run import BENCHMARKS, main


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
    assert all(name in capsys.readouterr().err for name in BENCHMARKS)
