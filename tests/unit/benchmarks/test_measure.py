from benchmarks.measure import compare
from benchmarks.report import make_report
from benchmarks.run import BENCHMARKS, main


def test_a_ratio_is_of_ours_over_the_peers_and_judged_by_its_goal() -> None:
    def work(rounds: int) -> int:
        return sum(range(rounds))

    row = compare(
        "work",
        ours=lambda: work(400_000),
        peer=lambda: work(100_000),
        peer_name="less work",
        at_most=1.5,
        pairs=5,
    )
    assert 1.5 < row.ratio < 20
    assert row.ratio_low <= row.ratio <= row.ratio_high
    assert row.met is False


def test_a_report_names_the_machine_and_the_versions() -> None:
    report = make_report("nothing", ())
    assert "cores" in report.machine
    assert {"python", "torch", "ray"} <= report.versions.keys()


def test_an_unknown_benchmark_is_one_line_that_lists_the_known_ones(capsys) -> None:
    assert main(["nothing-like-it"]) == 2
    assert all(name in capsys.readouterr().err for name in BENCHMARKS)
