"""When served data is so far from what a model was trained on that it is trained again: pure.

decision = DriftPolicy(psi=0.25, min_rows=1000).decide(DriftState(rows, drift, None))
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cluster.statistics.drift import SIDES, FeatureDrift, Side


@dataclass(frozen=True)
class DriftState:
    """What all gateways have counted of a champion, against its profile."""

    rows: Mapping[Side, float]
    drift: Mapping[Side, Mapping[str, FeatureDrift]]
    seconds_since_last: float | None = None
    """Since the model was last trained for drift; None if never."""
    is_under_way: bool = False
    """Whether such a training has not ended yet."""


@dataclass(frozen=True)
class DriftDecision:
    """Whether to train again, and why or why not."""

    retrain: bool
    reason: str


@dataclass(frozen=True)
class DriftPolicy:
    """Trains again once a feature's PSI is too large, and not again before `cool_down_s`."""

    psi: float = 0.25
    min_rows: int = 1000
    cool_down_s: float = 86_400.0

    def decide(self, state: DriftState) -> DriftDecision:
        sides = [side for side in SIDES if state.rows.get(side, 0.0) >= self.min_rows]
        if not sides:
            rows = max(state.rows.values(), default=0.0)
            return DriftDecision(False, f"{rows:.0f} rows are counted, {self.min_rows} are needed")
        found = [
            (feature.psi, side, name)
            for side in sides
            for name, feature in state.drift.get(side, {}).items()
        ]
        if not found:
            return DriftDecision(False, "no feature of the profile was seen")
        psi, side, name = max(found)
        what = f"PSI {psi:.2f} of {side} '{name}' over {state.rows[side]:.0f} rows"
        if psi < self.psi:
            return DriftDecision(False, f"{what}, less than {self.psi:g}")
        if state.is_under_way:
            return DriftDecision(False, f"{what}; it is being trained again already")
        since_s = state.seconds_since_last
        if since_s is not None and since_s < self.cool_down_s:
            left_s = self.cool_down_s - since_s
            return DriftDecision(
                False, f"{what}; trained again {since_s:.0f} s ago, not before {left_s:.0f} s more"
            )
        return DriftDecision(True, f"{what}, {self.psi:g} or more")
