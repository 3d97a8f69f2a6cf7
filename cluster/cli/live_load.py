"""A constant load on a served graph, and what its customers saw: counts, failures, times.

Each request is sent once, on a connection that is kept: whatever is retried, the gateway retries.

    with LiveLoad(settings, "digits", pixels, labels, num_customers=40) as load:
        ...
    load.seen.num_requests, load.seen.failures
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from cluster.settings import Settings

if TYPE_CHECKING:
    import httpx

_NUM_THREADS = 4
_TIMEOUT_S = 40.0
_MAX_FAILURES = 20


@dataclass
class Seen:
    """What customers got so far."""

    num_requests: int = 0
    num_failed: int = 0
    failures: list[str] = field(default_factory=list)
    """The first ones, in words."""
    by_version: Counter[str] = field(default_factory=Counter)
    wrong_by_version: Counter[str] = field(default_factory=Counter)
    """Answers that were not what is written on the picture."""
    latencies_ms: list[float] = field(default_factory=list)

    def quantile_ms(self, share: float) -> float:
        """0 before the first answer."""
        ordered = sorted(self.latencies_ms)
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else 0.0


class LiveLoad:
    """Threads that ask for one row at a time, as many customers in turn.

    Args:
        rows, labels: what is sent in input `pixels`, and the answers that are right.
        requests_per_s: of all threads together; a slow gateway gets fewer.
    """

    def __init__(
        self,
        settings: Settings,
        name: str,
        rows: Any,
        labels: Sequence[str],
        *,
        num_customers: int = 40,
        requests_per_s: float = 60.0,
    ) -> None:
        self._settings = settings
        self._name = name
        self._labels = labels
        self._bodies = [
            {
                "inputs": [
                    {
                        "name": "pixels",
                        "datatype": "FP32",
                        "shape": [1, row.size],
                        "data": row.reshape(-1).tolist(),
                    }
                ],
                "outputs": [{"name": "label"}],
            }
            for row in rows
        ]
        self._num_customers = num_customers
        self._period_s = _NUM_THREADS / requests_per_s
        self._ending = threading.Event()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._seen = Seen()

    def __enter__(self) -> Self:
        for number in range(_NUM_THREADS):
            thread = threading.Thread(target=self._run, args=(number,), daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join()

    @property
    def seen(self) -> Seen:
        """A copy."""
        with self._lock:
            seen = self._seen
            return Seen(
                seen.num_requests,
                seen.num_failed,
                list(seen.failures),
                seen.by_version.copy(),
                seen.wrong_by_version.copy(),
                list(seen.latencies_ms),
            )

    def _run(self, number: int) -> None:
        import httpx

        key = self._settings.api_key_path.read_text(encoding="ascii").strip()
        with httpx.Client(
            base_url=self._settings.gateway_url,
            headers={"Authorization": f"Bearer {key}"},
            timeout=_TIMEOUT_S,
            trust_env=False,
        ) as client:
            turn = number
            while not self._ending.is_set():
                started_s = time.perf_counter()
                self._ask(client, turn)
                turn += _NUM_THREADS
                self._ending.wait(max(0.0, self._period_s - (time.perf_counter() - started_s)))

    def _ask(self, client: httpx.Client, turn: int) -> None:
        import httpx

        row = turn % len(self._bodies)
        started_s = time.perf_counter()
        failure, label, version = "", "", ""
        try:
            answer = client.post(
                f"/v2/models/{self._name}/infer",
                json=self._bodies[row],
                headers={"x-session-id": f"customer-{turn % self._num_customers}"},
            )
            version = answer.headers.get("x-model-version", "")
            if answer.status_code == httpx.codes.OK:
                label = str(answer.json()["outputs"][0]["data"][0])
            else:
                failure = f"{answer.status_code} from {version or 'nobody'}: {answer.text[:200]}"
        except httpx.HTTPError as error:
            failure = f"{type(error).__name__}: {error}"
        latency_ms = 1000 * (time.perf_counter() - started_s)
        with self._lock:
            seen = self._seen
            seen.num_requests += 1
            seen.latencies_ms.append(latency_ms)
            if failure:
                seen.num_failed += 1
                if len(seen.failures) < _MAX_FAILURES:
                    seen.failures.append(failure)
                return
            seen.by_version[version] += 1
            if label != self._labels[row]:
                seen.wrong_by_version[version] += 1
