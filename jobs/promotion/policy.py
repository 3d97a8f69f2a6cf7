"""`PromotionPolicy`: may a candidate take the champion's place? Pure.

It knows nothing of registries, packages and data: measurements in, a decision with its reason out.

    PromotionPolicy(metric="accuracy", objective=0.95, budget=budget).decide(state)
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.statistics.paired import PairedResult
from jobs.models.config import HIGHER_IS_BETTER
from jobs.promotion.config import BudgetConfig, PromotionMetric


@dataclass(frozen=True)
class PromotionState:
    """What was measured."""

    candidate: float
    """The metric's value."""
    package_bytes: int
    ms_per_row: float
    champion: float | None = None
    comparison: PairedResult | None = None
    """Of the row values, turned so that higher is better; None without a champion."""
    incomparable: str = ""
    """Why there is a champion and no comparison with it."""


@dataclass(frozen=True)
class PromotionDecision:
    """Whether, and why: one line."""

    promote: bool
    reason: str


@dataclass(frozen=True)
class PromotionPolicy:
    """Objective first, then cost, then the paired comparison with the champion."""

    metric: PromotionMetric
    objective: float
    budget: BudgetConfig

    def decide(self, state: PromotionState) -> PromotionDecision:
        for reason in (self._misses_objective(state), self._costs_too_much(state)):
            if reason:
                return PromotionDecision(False, reason)
        if state.incomparable:
            return PromotionDecision(
                False,
                f"{self._reached(state)}, but cannot be compared with champion "
                f"{state.incomparable}",
            )
        if state.comparison is None:
            return PromotionDecision(
                True, f"{self._reached(state)}; there is no champion to compare with"
            )
        return self._compare(state, state.comparison)

    def _misses_objective(self, state: PromotionState) -> str:
        wanted, is_higher_better = self.objective, self.metric in HIGHER_IS_BETTER
        if (state.candidate >= wanted) if is_higher_better else (state.candidate <= wanted):
            return ""
        bound = "at least" if is_higher_better else "at most"
        return f"{self.metric} is {state.candidate:.4g}, and the objective is {bound} {wanted:g}"

    def _costs_too_much(self, state: PromotionState) -> str:
        megabytes, limit = state.package_bytes / 1e6, self.budget.max_package_mb
        if limit is not None and megabytes > limit:
            return f"the package has {megabytes:.4g} MB, and the budget is {limit:g}"
        limit = self.budget.max_ms_per_row
        if limit is not None and state.ms_per_row > limit:
            return f"a row takes {state.ms_per_row:.3g} ms, and the budget is {limit:g}"
        return ""

    def _compare(self, state: PromotionState, comparison: PairedResult) -> PromotionDecision:
        budget = self.budget
        passes = comparison.p_value <= budget.alpha
        relation = "<=" if passes else ">"
        evidence = (
            f"champion {state.champion:.4g}, {comparison.num_rows} paired rows, "
            f"p {comparison.p_value:.2g} {relation} {budget.alpha:g}"
        )
        verdict = "is" if passes else "is not shown to be"
        return PromotionDecision(
            passes,
            f"{self._reached(state)} and {verdict} less than {budget.max_regression:g} worse than "
            f"the champion ({evidence})",
        )

    def _reached(self, state: PromotionState) -> str:
        return f"{self.metric} {state.candidate:.4g} meets the objective {self.objective:g}"
