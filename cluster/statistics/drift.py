"""How far what is served is from what a model was trained on: PSI and KS of counts in fixed bins.

Memory does not grow: a window holds as many numbers as the profile, and the weight of older rows
halves with every `half_life_rows` newer ones. Windows of several processes add up.

    window = DriftWindow(profile, half_life_rows=5000)
    window.add("inputs", {"age": ages}, num_rows=len(ages))
    measure(profile, window.counts)["inputs"]["age"].psi        # 0.1 is some, 0.25 is much
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from cluster.statistics.profile import Array, Counts, DataProfile, Feature, Numbers

Side = Literal["inputs", "outputs"]
SIDES: tuple[Side, ...] = ("inputs", "outputs")
_ADDED = 0.5
"""To every bin, so that an empty one is unlikely and not impossible (Jeffreys)."""


@dataclass(frozen=True)
class FeatureDrift:
    """A feature's distance from its profile."""

    psi: float
    """Population stability index: 0 for the same shares in every bin."""
    ks: float | None
    """Largest difference of the two cumulative shares, seen at the bins' edges; None where values
    have no order."""


@dataclass(frozen=True)
class WindowCounts:
    """What a window holds."""

    rows: Mapping[Side, float] = field(default_factory=dict)
    """Rows, or requests for text, that it stands for."""
    counts: Mapping[Side, Mapping[str, Counts]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            side: {
                "rows": round(self.rows.get(side, 0.0), 2),
                "counts": {
                    name: [round(count, 2) for count in counts.tolist()]
                    for name, counts in self.counts.get(side, {}).items()
                },
            }
            for side in SIDES
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> WindowCounts:
        """The inverse of `to_json`."""
        return cls(
            rows={side: float(values[side]["rows"]) for side in SIDES},
            counts={
                side: {
                    name: np.asarray(counts, dtype=np.float64)
                    for name, counts in values[side]["counts"].items()
                }
                for side in SIDES
            },
        )


class DriftWindow:
    """The newest rows of one version."""

    def __init__(self, profile: DataProfile, *, half_life_rows: float) -> None:
        self.profile = profile
        self._half_life_rows = half_life_rows
        self._rows: dict[Side, float] = dict.fromkeys(SIDES, 0.0)
        self._counts: dict[Side, dict[str, Counts]] = {
            side: {
                name: np.zeros(len(feature.counts))
                for name, feature in features_of(profile, side).items()
            }
            for side in SIDES
        }

    def add(self, side: Side, values: Mapping[str, Array], *, num_rows: int) -> None:
        """Count values by feature; features that the profile does not have are left out."""
        if not num_rows:
            return
        kept = 0.5 ** (num_rows / self._half_life_rows)
        self._rows[side] = self._rows[side] * kept + num_rows
        for name, feature in features_of(self.profile, side).items():
            counts = self._counts[side][name]
            counts *= kept
            if name in values:
                counts += feature.count(values[name])

    @property
    def counts(self) -> WindowCounts:
        """A copy."""
        return WindowCounts(
            dict(self._rows),
            {side: {n: c.copy() for n, c in found.items()} for side, found in self._counts.items()},
        )


def features_of(profile: DataProfile, side: Side) -> Mapping[str, Feature]:
    return profile.inputs if side == "inputs" else profile.outputs


def add_up(profile: DataProfile, windows: Iterable[WindowCounts]) -> WindowCounts:
    """Several windows as one; what does not fit the profile is left out."""
    total = DriftWindow(profile, half_life_rows=math.inf).counts
    rows = dict(total.rows)
    for window in windows:
        for side in SIDES:
            rows[side] += window.rows.get(side, 0.0)
            for name, counts in window.counts.get(side, {}).items():
                mine = total.counts[side].get(name)
                if mine is not None and mine.shape == counts.shape:
                    mine += counts
    return WindowCounts(rows, total.counts)


def measure(profile: DataProfile, window: WindowCounts) -> dict[Side, dict[str, FeatureDrift]]:
    """The drift of every feature of which the window has any values."""
    return {
        side: {
            name: _measure(feature, window.counts[side][name])
            for name, feature in features_of(profile, side).items()
            if window.counts.get(side, {}).get(name, np.zeros(0)).sum() > 0
        }
        for side in SIDES
    }


def _measure(feature: Feature, counts: Counts) -> FeatureDrift:
    expected = np.asarray(feature.counts, dtype=np.float64)
    return FeatureDrift(
        psi=_psi(expected, counts),
        ks=_ks(expected, counts) if isinstance(feature, Numbers) else None,
    )


def _psi(expected: Counts, found: Counts) -> float:
    p = (expected + _ADDED) / (expected.sum() + _ADDED * len(expected))
    q = (found + _ADDED) / (found.sum() + _ADDED * len(found))
    return float(((q - p) * np.log(q / p)).sum())


def _ks(expected: Counts, found: Counts) -> float:
    if not expected.sum():
        return 0.0
    p, q = np.cumsum(expected) / expected.sum(), np.cumsum(found) / found.sum()
    return float(np.abs(p - q).max())
