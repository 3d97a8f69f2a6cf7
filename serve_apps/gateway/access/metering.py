"""What was answered, added up per key and model version until it is handed to the ledger.

One row per request would cost more than the request, so what came together in about a second is one
entry. A batch that may or may not have been taken is handed in again under the same keys.

    meter = UsageMeter("gateway/4f1c")
    meter.add(identity, "completion", served, num_requests=1, prompt_tokens=5, completion_tokens=7)
    ledger.record(meter.batch())
    meter.delivered()
"""

from __future__ import annotations

from collections.abc import Sequence

from cluster.ledger import Entry
from cluster.security.api_keys import Identity
from serve_apps.gateway.routing_table import ServedVersion

_Group = tuple[str, str, str, str, int]


class UsageMeter:
    """The counts of one gateway replica. Not for several threads."""

    def __init__(self, replica: str) -> None:
        self._replica = replica
        self._counts: dict[_Group, list[int]] = {}
        self._batch: list[Entry] = []
        self._num_batches = 0

    def add(
        self,
        identity: Identity,
        kind: str,
        served: ServedVersion,
        *,
        num_requests: int,
        prompt_tokens: int = 0,
        completion_tokens: int = 0,
    ) -> None:
        """Count an answer, or a part of one."""
        group = (identity.tenant, identity.key_id, kind, served.name, served.version)
        counts = self._counts.get(group)
        if counts is None:
            counts = self._counts[group] = [0, 0, 0]
        counts[0] += num_requests
        counts[1] += prompt_tokens
        counts[2] += completion_tokens

    @property
    def has_undelivered(self) -> bool:
        """Whether a batch was handed out and not yet taken for sure."""
        return bool(self._batch)

    def batch(self) -> Sequence[Entry]:
        """What to hand in: the batch that was not taken, or else all that was added since."""
        if not self._batch and self._counts:
            self._num_batches += 1
            counted, self._counts = self._counts, {}
            prefix = f"{self._replica}/{self._num_batches}"
            self._batch = [
                _entry(f"{prefix}/{number}", group, counts)
                for number, (group, counts) in enumerate(counted.items())
            ]
        return self._batch

    def delivered(self) -> None:
        """The batch is in the ledger."""
        self._batch = []


def _entry(key: str, group: _Group, counts: Sequence[int]) -> Entry:
    tenant, key_id, kind, model, version = group
    return Entry(
        key=key,
        tenant=tenant,
        kind=kind,
        model=model,
        source=key_id,
        version=version,
        num_requests=counts[0],
        prompt_tokens=counts[1],
        completion_tokens=counts[2],
    )
