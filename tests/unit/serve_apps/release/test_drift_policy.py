"""When drift leads to training: a table."""

from __future__ import annotations

import pytest

from cluster.statistics.drift import FeatureDrift
from serve_apps.release.drift_policy import DriftPolicy, DriftState

POLICY = DriftPolicy(psi=0.25, min_rows=1000, cool_down_s=3600)


def state(
    psi: float = 0.5,
    rows: float = 2000,
    since: float | None = None,
    *,
    is_under_way: bool = False,
) -> DriftState:
    return DriftState(
        rows={"inputs": rows, "outputs": 0.0},
        drift={"inputs": {"age": FeatureDrift(psi, 0.1), "bmi": FeatureDrift(0.01, None)}},
        seconds_since_last=since,
        is_under_way=is_under_way,
    )


@pytest.mark.parametrize(
    ("seen", "retrain", "reason"),
    [
        (state(), True, "PSI 0.50 of inputs 'age' over 2000 rows, 0.25 or more"),
        (state(psi=0.25), True, "PSI 0.25 "),
        (state(psi=0.2), False, "less than 0.25"),
        (state(rows=999), False, "999 rows are counted, 1000 are needed"),
        (state(since=3599.0), False, "trained again 3599 s ago, not before 1 s more"),
        (state(since=3600.0), True, "0.25 or more"),
        (state(since=9999.0, is_under_way=True), False, "already"),
        (DriftState({}, {}), False, "0 rows are counted"),
        (DriftState({"inputs": 5000.0}, {"inputs": {}}), False, "no feature"),
    ],
)
def test_decisions(seen: DriftState, retrain: bool, reason: str) -> None:
    decision = POLICY.decide(seen)
    assert decision.retrain is retrain
    assert reason in decision.reason


def test_a_side_with_few_rows_says_nothing_beside_one_with_many() -> None:
    drift = {
        "inputs": {"age": FeatureDrift(0.05, 0.1)},
        "outputs": {"label": FeatureDrift(3.0, None)},
    }
    seen = DriftState({"inputs": 5000.0, "outputs": 10.0}, drift)  # type: ignore[arg-type]
    assert not POLICY.decide(seen).retrain
