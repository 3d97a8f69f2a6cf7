"""Whether a request may join a queue: not if it could only be answered late.

A count alone bounds nothing that a client feels: a thousand waiting requests are a tenth of a
second at one model and a minute at another. So the wait is what is bounded, as the measured calls
foretell it. A burst may wait; what keeps asking for more than the model gives may not build a queue
that every later request would stand in.

    times = ServiceTimes(max_batch_size=64)
    times.observe(num_samples=8, seconds=0.012)
    decision = AdmissionPolicy().decide(QueueState(num_queued=3, …))
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

_STEADY_CALLS = 1.5
_STEADY_SAMPLES = 8
"""Under overload so many worthwhile calls and samples may wait, so that the model is kept busy."""
_WORTHWHILE = 0.9
"""A call is large enough where larger ones would add less than a tenth to the throughput."""
_MIN_CALL_S = 1e-6
_OVERLOAD = 1.1
"""What is asked beyond this share of the capacity counts as too much; measured figures err."""
_FULL_CALLS = 1.25
"""As many samples at once as fit into one full call are a burst, and a few more."""
_MAX_FULL_CALLS = 1.5
"""Where full calls take long, nobody waits for more of them than this."""
_MAX_BURSTS = 1.5
"""How much excess is remembered, so that the end of an overload is noticed soon."""


@dataclass(frozen=True)
class QueueState:
    """What a request finds that asks to join."""

    num_queued: int
    max_queued: int
    wait_s: float
    """Expected time until it would be begun."""
    max_wait_s: float
    excess_s: float
    """Work asked for lately beyond what could be done meanwhile, refused work included."""
    burst_s: float
    """Excess up to this is a burst, which is let in and worked off."""
    steady_wait_s: float
    """The wait that keeps the model busy."""


@dataclass(frozen=True)
class AdmissionDecision:
    """Whether to let it in, and why not."""

    admits: bool
    reason: str = ""


_YES = AdmissionDecision(True)


class AdmissionPolicy:
    """Refuses what would wait too long, or keeps others waiting too long."""

    def decide(self, state: QueueState) -> AdmissionDecision:
        """Pure."""
        if state.num_queued >= state.max_queued:
            return AdmissionDecision(
                False, f"the queue to this model is full, with {state.num_queued} waiting"
            )
        if state.wait_s > state.max_wait_s:
            return AdmissionDecision(
                False,
                f"a request would wait {state.wait_s:.2g} s for this model, and "
                f"{state.max_wait_s:.2g} s is the most allowed",
            )
        return self.decide_to_stay(state)

    def decide_to_stay(self, state: QueueState) -> AdmissionDecision:
        """The same for the newest in the queue: the burst that it came with may not have ended."""
        if state.excess_s > state.burst_s and state.wait_s > state.steady_wait_s:
            return AdmissionDecision(
                False,
                "more is asked of this model than it can answer; a request would wait "
                f"{state.wait_s:.2g} s",
            )
        return _YES


class ServiceTimes:
    """How long calls take by the number of samples they carry, from the calls that were made.

    One smoothed figure for each power of two, and a straight line through them: seconds = fixed +
    slope * samples. Before calls of two sizes were seen, samples are taken to cost nothing more.
    """

    def __init__(self, max_batch_size: int) -> None:
        self.max_batch_size = max_batch_size
        self._seen: dict[int, tuple[float, float]] = {}
        """By power of two: samples and seconds of a call, on average."""
        self.full_call_s = 0.0
        """A call of max_batch_size samples."""
        self.sample_s = 0.0
        """What a sample costs in such a call."""
        self.worthwhile_samples = float(max_batch_size)
        """The smallest call with about that throughput."""
        self.worthwhile_call_s = 0.0

    def observe(self, num_samples: int, seconds: float) -> None:
        """Take a call that succeeded into account."""
        size = max(1, min(num_samples, self.max_batch_size))
        samples, known_s = self._seen.get(size.bit_length(), (float(size), seconds))
        # One hiccup, such as a replica's start, must not look like the model's own speed.
        share = 0.3 if seconds < known_s else 0.1
        seen_s = min(seconds, 4 * known_s)
        self._seen[size.bit_length()] = (
            samples + share * (size - samples),
            max(_MIN_CALL_S, known_s + share * (seen_s - known_s)),
        )
        fixed_s, slope_s = _fit(self._seen.values())
        self.full_call_s = fixed_s + slope_s * self.max_batch_size
        self.sample_s = self.full_call_s / self.max_batch_size
        # n samples give n / (fixed + slope n) a second, and _WORTHWHILE / sample_s is enough.
        rest_s = self.sample_s - _WORTHWHILE * slope_s
        self.worthwhile_samples = max(1.0, _WORTHWHILE * fixed_s / rest_s)
        self.worthwhile_call_s = fixed_s + slope_s * self.worthwhile_samples


def _fit(calls: Collection[tuple[float, float]]) -> tuple[float, float]:
    """Fixed seconds and seconds per sample, both at least 0, with the least relative errors."""
    weights = [(1 / seconds**2, samples, seconds) for samples, seconds in calls]
    total = sum(w for w, _, _ in weights)
    mean_samples = sum(w * n for w, n, _ in weights) / total
    mean_s = sum(w * s for w, _, s in weights) / total
    spread = sum(w * (n - mean_samples) ** 2 for w, n, _ in weights) / total
    if spread < 0.25:
        return mean_s, 0.0
    slope_s = sum(w * (n - mean_samples) * (s - mean_s) for w, n, s in weights) / total / spread
    slope_s = min(max(0.0, slope_s), mean_s / mean_samples)
    return mean_s - slope_s * mean_samples, slope_s


class Admission:
    """What one queue keeps in mind: how long its calls take, and how much was asked of it.

    Args:
        max_parallel: calls that run at once.
        max_wait_s: a burst may cause such a wait, or a full call's if that takes longer.
    """

    def __init__(
        self, *, max_queued: int, max_batch_size: int, max_parallel: int, max_wait_s: float
    ) -> None:
        self._max_queued = max_queued
        self._max_parallel = max_parallel
        self._max_wait_s = max_wait_s
        self._policy = AdmissionPolicy()
        self._excess_samples = 0.0
        self._asked_at_s = 0.0
        self.times = ServiceTimes(max_batch_size)

    def ask(
        self, now_s: float, num_samples: int, *, num_queued: int, samples_ahead: float
    ) -> AdmissionDecision:
        """Decide on a request, which counts as asked for whatever the decision.

        Args:
            now_s: of any clock that only goes forward.
            samples_ahead: what has to be done before it, waiting or under way.
        """
        self._count(now_s, num_samples)
        return self._policy.decide(self._state(num_queued, samples_ahead))

    def ask_to_stay(self, *, num_queued: int, samples_ahead: float) -> AdmissionDecision:
        """Decide on the newest in the queue."""
        return self._policy.decide_to_stay(self._state(num_queued, samples_ahead))

    @property
    def call_size(self) -> int:
        """Samples to join into one call: fewer where more is asked than can be done and larger
        calls would only take longer."""
        if self._excess_samples * self._sample_s() <= self._steady_wait_s():
            return self.times.max_batch_size
        worthwhile = max(_STEADY_SAMPLES, round(self.times.worthwhile_samples))
        return min(self.times.max_batch_size, worthwhile)

    def _state(self, num_queued: int, samples_ahead: float) -> QueueState:
        burst_s = self._burst_s()
        return QueueState(
            num_queued=num_queued,
            max_queued=self._max_queued,
            wait_s=samples_ahead * self._sample_s(),
            max_wait_s=max(
                2 * self._max_wait_s,
                2 * self._steady_wait_s(),
                _MAX_FULL_CALLS * self.times.full_call_s,
            ),
            excess_s=self._excess_samples * self._sample_s(),
            burst_s=burst_s,
            steady_wait_s=self._steady_wait_s(),
        )

    def _count(self, now_s: float, num_samples: int) -> None:
        elapsed_s, self._asked_at_s = now_s - self._asked_at_s, now_s
        if not (sample_s := self._sample_s()):
            return
        left = max(0.0, self._excess_samples - _OVERLOAD * elapsed_s / sample_s)
        most = _MAX_BURSTS * self._burst_s() / sample_s
        self._excess_samples = min(left + num_samples, most)

    def _sample_s(self) -> float:
        """Time between two samples that are done."""
        return self.times.sample_s / self._max_parallel

    def _burst_s(self) -> float:
        return max(
            self._max_wait_s, 2 * self._steady_wait_s(), _FULL_CALLS * self.times.full_call_s
        )

    def _steady_wait_s(self) -> float:
        worthwhile_s = _STEADY_CALLS * self.times.worthwhile_call_s
        return worthwhile_s + _STEADY_SAMPLES * self._sample_s()
