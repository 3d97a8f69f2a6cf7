"""What a gateway replica counts: the names, labels and buckets of its Prometheus metrics.

No label takes its value from a client: models are those served or "unknown", tenants those that
`name_tenants` was given or "other", routes are the application's own. Documented in
docs/observability.md.

    instruments = Instruments()
    instruments.answered("openai", "/v1/completions", 200, 0.012)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

OTHER_TENANT = "other"
_LATENCY_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_TOKEN_S = (0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 5)
_SAMPLES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_VERSION = ("model", "version")


class ModelLabel(NamedTuple):
    """A served version, or what stands for none."""

    model: str
    version: str


NO_MODEL = ModelLabel("none", "none")
"""Of a request that is about no model."""
UNKNOWN_MODEL = ModelLabel("unknown", "unknown")
"""Of a request for what is not served."""


class VersionCells:
    """The metrics of one version, looked up once."""

    def __init__(self, instruments: Instruments, label: ModelLabel) -> None:
        of = instruments.of_version
        self.answered: dict[tuple[str, int], Counter] = {}
        self.duration: Callable[[float], None] = of["duration"].labels(*label).observe
        self.wait: Callable[[float], None] = of["wait"].labels(*label).observe
        self.batch: Callable[[float], None] = of["batch"].labels(*label).observe
        self.call: Callable[[float], None] = of["call"].labels(*label).observe
        self.first_token: Callable[[float], None] = of["ttft"].labels(*label).observe
        self.next_token: Callable[[float], None] = of["itl"].labels(*label).observe
        self.streams: Gauge = instruments.open_streams.labels(*label)


class Instruments:
    """One replica's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def histogram(
            name: str, what: str, labels: Iterable[str], buckets: tuple[float, ...]
        ) -> Histogram:
            return Histogram(
                f"heliostat_{name}", what, labels, buckets=buckets, registry=self.registry
            )

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"heliostat_{name}_total", what, labels, registry=self.registry)

        def gauge(name: str, what: str, *labels: str) -> Gauge:
            return Gauge(f"heliostat_{name}", what, labels, registry=self.registry)

        route = ("protocol", "route")
        self.requests = counter("requests", "Requests answered", *route, "status")
        self.duration = histogram(
            "request_duration_seconds", "From a request to the end of its answer", route, _LATENCY_S
        )
        self.in_flight = gauge("requests_in_flight", "Requests being answered", "protocol")
        self.model_requests = counter(
            "model_requests", "Requests for models answered", *_VERSION, "tenant", "status"
        )
        self.shed = counter("shed", "Requests refused for lack of room", "reason", *_VERSION)
        self.tokens = counter("tokens", "Tokens read and generated", *_VERSION, "tenant", "kind")
        self.queue_depth = gauge("queue_depth", "Requests waiting for a batch", *_VERSION)
        self.open_streams = gauge("open_streams", "Answers being generated", *_VERSION)
        feature = (*_VERSION, "side", "feature")
        self.drift_psi = gauge("drift_psi", "Population stability index", *feature)
        self.drift_ks = gauge("drift_ks", "Largest difference of cumulative shares", *feature)
        self.drift_rows = gauge("drift_rows", "Rows that drift is told of", *_VERSION, "side")
        self.of_version: Mapping[str, Histogram] = {
            "duration": histogram(
                "model_request_duration_seconds",
                "From a request for a model to the end of its answer",
                _VERSION,
                _LATENCY_S,
            ),
            "wait": histogram(
                "queue_wait_seconds", "Wait of a request for its batch", _VERSION, _LATENCY_S
            ),
            "batch": histogram("batch_samples", "Samples in one call", _VERSION, _SAMPLES),
            "call": histogram(
                "call_duration_seconds", "Calls of replicas with one batch", _VERSION, _LATENCY_S
            ),
            "ttft": histogram(
                "time_to_first_token_seconds",
                "From a request to its first token",
                _VERSION,
                _LATENCY_S,
            ),
            "itl": histogram(
                "inter_token_latency_seconds",
                "Between the tokens of an answer; for several that come together, their share",
                _VERSION,
                _TOKEN_S,
            ),
        }
        self.continuations = counter(
            "stream_continuations", "Answers that went on at another replica", *_VERSION, "reason"
        )
        self.state = gauge("version_state", "1 for the state a version is in", *_VERSION, "state")
        trial = (*_VERSION, "arm", "metric")
        self.observations = counter("release_observations", "Observations in a release", *trial)
        self.badness = counter(
            "release_badness", "Sum of a release's observations, from 0 (good) to 1 each", *trial
        )
        self.mirrored_requests = counter(
            "mirrored_requests", "Requests to a version on trial for nobody", *_VERSION, "outcome"
        )
        self.failed_over = counter(
            "failed_over", "Requests that a canary failed and the champion answered", *_VERSION
        )
        self._per_version = (
            self.model_requests, self.shed, self.tokens, self.queue_depth, self.state,
            self.open_streams, self.continuations, self.observations, self.badness,
            self.mirrored_requests, self.failed_over, self.drift_psi, self.drift_ks,
            self.drift_rows, *self.of_version.values(),
        )  # fmt: skip
        self._tenants: frozenset[str] = frozenset()
        self._in_flight: dict[str, Gauge] = {}
        self._routes: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}
        self._versions: dict[ModelLabel, VersionCells] = {}

    def in_flight_of(self, protocol: str) -> Gauge:
        """Requests of a protocol that are being answered."""
        cell = self._in_flight.get(protocol)
        if cell is None:
            cell = self._in_flight[protocol] = self.in_flight.labels(protocol)
        return cell

    def answered(self, protocol: str, route: str, status: int, duration_s: float) -> None:
        """Count an answer."""
        cells = self._routes.get((protocol, route, status))
        if cells is None:
            cells = self._routes[protocol, route, status] = (
                self.requests.labels(protocol, route, str(status)),
                self.duration.labels(protocol, route),
            )
        cells[0].inc()
        cells[1].observe(duration_s)

    def answered_model(
        self, label: ModelLabel, tenant: str, status: int, duration_s: float
    ) -> None:
        """Count an answer of a model; `tenant` is a label."""
        cells = self.version(label)
        answered = cells.answered.get((tenant, status))
        if answered is None:
            answered = self.model_requests.labels(*label, tenant, str(status))
            cells.answered[tenant, status] = answered
        answered.inc()
        cells.duration(duration_s)

    def enter(self, label: ModelLabel, state: str) -> None:
        """A version is in this state now."""
        self.version(label)
        self.state.remove_by_labels({"model": label.model, "version": label.version})
        self.state.labels(*label, state).set(1)

    def observed(self, label: ModelLabel, arm: str, metric: str, value: float) -> None:
        """Count an observation of a release; the label is the candidate's."""
        self.observations.labels(*label, arm, metric).inc()
        self.badness.labels(*label, arm, metric).inc(value)

    def mirrored(self, label: ModelLabel, outcome: str) -> None:
        """Count a request to a candidate that no customer made."""
        self.mirrored_requests.labels(*label, outcome).inc()

    def version(self, label: ModelLabel) -> VersionCells:
        """The metrics of a version."""
        cells = self._versions.get(label)
        if cells is None:
            cells = self._versions[label] = VersionCells(self, label)
        return cells

    def tenant(self, name: str | None) -> str:
        """The label for a tenant; "none" where nobody was identified."""
        if name is None:
            return "none"
        return name if name in self._tenants else OTHER_TENANT

    def name_tenants(self, names: Iterable[str]) -> None:
        """Tenants that are told apart from now on."""
        self._tenants = frozenset(names)

    def keep_only(self, labels: Iterable[ModelLabel]) -> None:
        """Forget the versions that are no longer served."""
        for gone in set(self._versions) - set(labels) - {NO_MODEL, UNKNOWN_MODEL}:
            del self._versions[gone]
            for metric in self._per_version:
                metric.remove_by_labels({"model": gone.model, "version": gone.version})
