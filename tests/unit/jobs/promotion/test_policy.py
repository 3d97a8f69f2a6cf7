import pytest

from cluster.statistics.paired import PairedResult
from jobs.promotion.config import BudgetConfig, PromotionMetric
from jobs.promotion.policy import PromotionPolicy, PromotionState

BUDGET = BudgetConfig(max_regression=0.01, alpha=0.05, max_package_mb=10, max_ms_per_row=5)
GOOD = {"candidate": 0.97, "package_bytes": 5_000_000, "ms_per_row": 1.0}
PROVEN = PairedResult(num_rows=400, mean_difference=0.0, p_value=0.01)
UNPROVEN = PairedResult(num_rows=400, mean_difference=0.0, p_value=0.2)


def state(**changes: object) -> PromotionState:
    return PromotionState(**{**GOOD, **changes})


@pytest.mark.parametrize(
    ("measured", "promote", "reason"),
    [
        (state(), True, "no champion"),
        (state(candidate=0.9), False, "accuracy is 0.9, and the objective is at least 0.95"),
        (state(package_bytes=11_000_000), False, "11 MB, and the budget is 10"),
        (state(ms_per_row=6.0), False, "6 ms, and the budget is 5"),
        (state(champion=0.97, comparison=PROVEN), True, "p 0.01 <= 0.05"),
        (state(champion=0.97, comparison=UNPROVEN), False, "not shown to be less than 0.01 worse"),
        (state(incomparable="m/1: gone"), False, "cannot be compared with champion m/1: gone"),
        (state(candidate=0.9, incomparable="m/1: gone"), False, "objective is at least"),
        # A better mean is no proof.
        (state(champion=0.96, comparison=UNPROVEN), False, "p 0.2 > 0.05"),
    ],
)
def test_it_decides_with_its_reason(measured: PromotionState, promote: bool, reason: str) -> None:
    decision = PromotionPolicy("accuracy", 0.95, BUDGET).decide(measured)
    assert decision.promote is promote
    assert reason in decision.reason


@pytest.mark.parametrize(("metric", "reached"), [("loss", False), ("accuracy", True)])
def test_the_objective_follows_the_metrics_direction(
    metric: PromotionMetric, reached: bool
) -> None:
    decision = PromotionPolicy(metric, 0.5, BUDGET).decide(state(candidate=0.7))
    assert decision.promote is reached
