"""Which share of a name's traffic a customer belongs to: the same for every request of theirs.

While a version's weight only grows, whoever it answers stays with it, on every gateway and after a
restart. Who is among the first is another matter for each model and each pair of versions.

    share = share_of("acme", "digits", [3, 4])          # from [0, 1)
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping

SESSION_HEADER = "x-session-id"
"""Names the customer within a tenant; without it OpenAI's `user` does, or else the tenant is one.

It only chooses between versions, so that nothing is lost where a client makes it up."""

_RANGE = 1 << 64


def share_of(customer: str, name: str, versions: Collection[int]) -> float:
    """A customer's place in [0, 1), evenly spread over customers."""
    text = "\n".join([name, ",".join(map(str, sorted(versions))), customer])
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / _RANGE


def version_at(weights: Mapping[int, float], share: float) -> int | None:
    """The version that answers at this place; None where there is none."""
    threshold = share * sum(weights.values())
    for version, weight in sorted(weights.items()):
        if threshold < weight:
            return version
        threshold -= weight
    return max(weights, default=None)
