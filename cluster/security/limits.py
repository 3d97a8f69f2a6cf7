"""What a tenant may spend, and how gateway replicas share it: pure decisions, no clock, no SQL.

A minute is counted in slots of two seconds. A replica leases a slice, which counts in the slot of
its lease, spends it within the second that follows, and gives back what it did not need. A slot
counts for as long as anything leased in it can lie within the last 60 seconds, so no 60 seconds
ever hold more than the limit. Open streams, and tokens reserved of a month's budget, are held by
name of the replica until it lets go, or until it has been silent for ten seconds.

    budget, lease = decide(budget, limits, ask, holder="gateway-1", now_s=1_700_000_000.0)
    lease.granted["requests"]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Literal

WINDOW_S = 60
SLOT_S = 2
LEASE_S = 1.0
"""How long a slice of a minute's limit may be spent after it was asked for."""
HOLDING_S = 10.0
"""How long a silent replica keeps the streams and the month's tokens that it holds."""

Rate = Literal["requests", "tokens"]
Holding = Literal["streams", "month_tokens"]
Unit = Rate | Holding
RATES: tuple[Rate, ...] = ("requests", "tokens")
HOLDINGS: tuple[Holding, ...] = ("streams", "month_tokens")


@dataclass(frozen=True)
class TenantLimits:
    """What a tenant may spend; None is without limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_streams: int | None = None
    monthly_tokens: int | None = None

    @property
    def is_limited(self) -> bool:
        return self != UNLIMITED

    def of(self, unit: Unit) -> int | None:
        return {
            "requests": self.requests_per_minute,
            "tokens": self.tokens_per_minute,
            "streams": self.max_streams,
            "month_tokens": self.monthly_tokens,
        }[unit]


UNLIMITED = TenantLimits()


@dataclass(frozen=True)
class Holdings:
    """What one replica holds of what comes back."""

    amounts: Mapping[Holding, int]
    expires_at_s: float


@dataclass(frozen=True)
class Budget:
    """What is leased and held of one tenant's limits."""

    slots: Mapping[Rate, Mapping[int, int]] = field(default_factory=dict)
    """How much was leased in each slot, and not given back."""
    month: str = ""
    month_tokens: int = 0
    """Tokens in the ledger of this month."""
    holders: Mapping[str, Holdings] = field(default_factory=dict)


@dataclass(frozen=True)
class Ask:
    """What a replica wants of one tenant's budget."""

    needs: Mapping[Unit, int] = field(default_factory=dict)
    """Less than this is of no use."""
    wants: Mapping[Unit, int] = field(default_factory=dict)
    """More than this is not; of streams and the month's tokens, beyond what is kept."""
    returns: Mapping[Rate, Mapping[int, int]] = field(default_factory=dict)
    """What is given back, by the slot it was leased in."""
    keeps: Mapping[Holding, int] = field(default_factory=dict)
    """What is held and in use, which is granted again."""
    spent: int = 0
    """Of the month's tokens that are kept, those that do not come back."""


@dataclass(frozen=True)
class Lease:
    """The answer to an Ask."""

    slot: int
    granted: Mapping[Unit, int]
    left: Mapping[Unit, int]
    """What nobody has leased or holds."""
    retry_after_s: Mapping[Unit, float]
    """Until there may be as much as was needed, for each unit that lacks it."""


def decide(
    budget: Budget, limits: TenantLimits, ask: Ask, *, holder: str, now_s: float
) -> tuple[Budget, Lease]:
    """Grant what there is room for; `budget.month` must be that of `now_s`."""
    slot = int(now_s // SLOT_S)
    granted: dict[Unit, int] = {}
    left: dict[Unit, int] = {}
    retry_after_s: dict[Unit, float] = {}
    slots: dict[Rate, Mapping[int, int]] = {}
    for rate in RATES:
        found = _still_counting(budget.slots.get(rate, {}), ask.returns.get(rate, {}), now_s)
        limit = limits.of(rate)
        if limit is not None:
            need, room = ask.needs.get(rate, 0), limit - sum(found.values())
            granted[rate] = amount = _grant(need, ask.wants.get(rate, 0), room)
            left[rate] = max(0, room - amount)
            if amount:
                found[slot] = found.get(slot, 0) + amount
            elif need > room:
                retry_after_s[rate] = _until_room(found, need - room, now_s)
        if found:
            slots[rate] = found
    holders = {
        name: holdings
        for name, holdings in budget.holders.items()
        if name != holder and holdings.expires_at_s > now_s
    }
    held: dict[Holding, int] = {}
    for unit in HOLDINGS:
        held[unit] = ask.keeps.get(unit, 0)
        limit = limits.of(unit)
        if limit is None:
            continue
        others = sum(holdings.amounts.get(unit, 0) for holdings in holders.values())
        settled = budget.month_tokens if unit == "month_tokens" else 0
        need, room = ask.needs.get(unit, 0), limit - settled - others - held[unit]
        granted[unit] = amount = _grant(need, ask.wants.get(unit, 0), room)
        held[unit] += amount
        left[unit] = max(0, room - amount)
        if not amount and need > room:
            is_spent = unit == "month_tokens" and limit - settled - ask.spent < need
            retry_after_s[unit] = seconds_to_next_month(now_s) if is_spent else 1.0
    if any(held.values()):
        holders[holder] = Holdings(held, now_s + HOLDING_S)
    after = Budget(slots, budget.month, budget.month_tokens, holders)
    return after, Lease(slot, granted, left, retry_after_s)


def month_of(now_s: float) -> str:
    """The month of a time, in UTC, as the beginning of the ledger's times: 2026-01."""
    return datetime.fromtimestamp(now_s, UTC).strftime("%Y-%m")


def seconds_to_next_month(now_s: float) -> float:
    now = datetime.fromtimestamp(now_s, UTC)
    first = now.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    return ((first + timedelta(days=32)).replace(day=1) - now).total_seconds()


def _grant(need: int, want: int, room: int) -> int:
    """As much as is wanted and there is, unless that is less than what is needed."""
    return min(max(need, want), room) if room >= max(need, 1) else 0


def _still_counting(
    slots: Mapping[int, int], returned: Mapping[int, int], now_s: float
) -> dict[int, int]:
    """What lies within the last minute, or may still be spent within it.

    What lies more than a minute ahead was leased by a clock that was wrong.
    """
    oldest = int((now_s - WINDOW_S - LEASE_S) // SLOT_S)
    newest = int((now_s + WINDOW_S) // SLOT_S)
    kept = {
        slot: amount - returned.get(slot, 0)
        for slot, amount in slots.items()
        if oldest <= slot <= newest
    }
    return {slot: amount for slot, amount in kept.items() if amount > 0}


def _until_room(slots: Mapping[int, int], lacking: int, now_s: float) -> float:
    """Seconds until so much has left the window."""
    for slot in sorted(slots):
        lacking -= slots[slot]
        if lacking <= 0:
            return (slot + 1) * SLOT_S + WINDOW_S + LEASE_S - now_s
    return WINDOW_S + LEASE_S
