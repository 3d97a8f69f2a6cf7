"""Whether an answer was slow, by what the champion took lately for requests of about that size.

Slow is what takes half as long again as all but a twentieth of the champion's recent answers. Both
versions are held against the same bar, which only knows the past: of two equal versions, equally
many answers are slow, however the machine's speed changes.

    slowness = Slowness()
    slowness.learn("slow", num_samples, seconds)          # an answer of the champion
    slowness.judge("slow", num_samples, seconds)          # True, False, or None: not known yet
"""

from __future__ import annotations

from collections import deque

_QUANTILE = 0.95
_FACTOR = 1.5
_RECENT = 256
_ENOUGH = 32
"""Fewer answers than this say nothing about a twentieth of them."""
_EVERY = 16
"""The bar is set anew after so many."""


class Slowness:
    """The bars of one release, by kind of wait and by power of two of the size."""

    def __init__(self) -> None:
        self._bars: dict[tuple[str, int], _Bar] = {}

    def learn(self, kind: str, size: int, seconds: float) -> None:
        """The champion took so long."""
        key = (kind, size.bit_length())
        bar = self._bars.get(key)
        if bar is None:
            bar = self._bars[key] = _Bar()
        bar.learn(seconds)

    def judge(self, kind: str, size: int, seconds: float) -> bool | None:
        """Whether so long is slow; None as long as the champion has answered too few such."""
        bar = self._bars.get((kind, size.bit_length()))
        return None if bar is None or bar.limit_s is None else seconds > bar.limit_s


class _Bar:
    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._num_learnt = 0
        self.limit_s: float | None = None

    def learn(self, seconds: float) -> None:
        self._recent.append(seconds)
        self._num_learnt += 1
        if self._num_learnt >= _ENOUGH and self._num_learnt % _EVERY == 0:
            ordered = sorted(self._recent)
            self.limit_s = _FACTOR * ordered[int(_QUANTILE * (len(ordered) - 1))]
