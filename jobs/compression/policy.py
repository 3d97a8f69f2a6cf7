"""`CompressionPolicy`: which of the candidates is registered? Pure.

It knows nothing of packages and data: measurements in, a decision with its reason out.

    policy = CompressionPolicy(metric="loss", max_loss_increase=0.01)
    policy.decide(parent, [int8, int4]).chosen
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jobs.compression.config import QualityMetric


@dataclass(frozen=True)
class Measured:
    """A model, as small and as good as it is."""

    label: str
    size_bytes: int
    quality: float
    """Of the policy's metric; lower is better."""
    density: float = 1.0
    """Share of the weights that are not zero."""
    refusal: str = ""
    """Why it cannot be packaged whatever its quality; empty if it can."""


@dataclass(frozen=True)
class CompressionDecision:
    """Which one, and why: one line. None if the parent stays the best there is."""

    chosen: Measured | None
    reason: str


@dataclass(frozen=True)
class CompressionPolicy:
    """The smallest candidate whose metric grew by no more than the budget."""

    metric: QualityMetric
    max_loss_increase: float

    def increase(self, parent: Measured, candidate: Measured) -> float:
        """How much the metric grew, as a share of the parent's; negative if it fell."""
        difference = candidate.quality - parent.quality
        if difference == 0:
            return 0.0
        if parent.quality == 0 or not math.isfinite(difference):
            return math.inf if not difference < 0 else -math.inf
        return difference / abs(parent.quality)

    def is_within(self, parent: Measured, candidate: Measured) -> bool:
        return self.increase(parent, candidate) <= self.max_loss_increase

    def decide(self, parent: Measured, candidates: Sequence[Measured]) -> CompressionDecision:
        """The first of two that are equally small is taken."""
        smaller = [one for one in candidates if not one.refusal and _is_smaller(one, parent)]
        if not smaller:
            return CompressionDecision(None, self._none_is_smaller(parent, candidates))
        within = [one for one in smaller if self.is_within(parent, one)]
        if not within:
            best = min(smaller, key=lambda one: self.increase(parent, one))
            return CompressionDecision(
                None,
                f"none stays within the budget; the best found is {best.label}, "
                f"{self._told(parent, best)}",
            )
        chosen = min(within, key=_smallness)
        return CompressionDecision(
            chosen,
            f"{chosen.label} is the smallest of {len(within)} within the budget: "
            f"{parent.size_bytes / chosen.size_bytes:.2f} times smaller, "
            f"{self._told(parent, chosen)}",
        )

    def _told(self, parent: Measured, candidate: Measured) -> str:
        return (
            f"{self.metric} {parent.quality:.4g} -> {candidate.quality:.4g} "
            f"({self.increase(parent, candidate):+.2%}, at most {self.max_loss_increase:+.2%})"
        )

    def _none_is_smaller(self, parent: Measured, candidates: Sequence[Measured]) -> str:
        refused = [one for one in candidates if one.refusal]
        if refused:
            return f"none can be packaged; {refused[0].label}: {refused[0].refusal}"
        best = min(candidates, key=_smallness)
        return (
            f"none is smaller than {parent.label} ({parent.size_bytes:,} bytes); "
            f"the smallest found is {best.label} ({best.size_bytes:,} bytes)"
        )


def _smallness(measured: Measured) -> tuple[int, float]:
    return measured.size_bytes, measured.density


def _is_smaller(candidate: Measured, parent: Measured) -> bool:
    """Zeros cost as many bytes as other weights; that they are there counts all the same."""
    return candidate.size_bytes < parent.size_bytes or candidate.density < parent.density
