"""One tenant's limits in this replica: what is leased, spent and given back. No SQL, no waiting.

An account spends from slices that were leased ahead (`cluster/security/limits.py` has the rules);
where they do not last, whoever asks waits for the next exchange with the database, or is refused at
once while it is known that there is no more.

    account = Account("acme", limits)
    slot = account.take_rate("requests", 1, now_s)      # None: not now
    ask = account.ask(now_s, hands_in=True)
    account.apply(lease, asked_at_s=now_s)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from cluster.errors import InputError, QuotaExceededError, RateLimitedError
from cluster.security.limits import (
    HOLDINGS,
    LEASE_S,
    RATES,
    SLOT_S,
    WINDOW_S,
    Ask,
    Holding,
    Lease,
    Rate,
    TenantLimits,
    Unit,
)

_SHARE_AHEAD = 16
"""Of a limit, at most one part in so many is leased before anybody asks for it."""
_REMEMBER_REFUSAL_S = 0.5
"""What others gave back meanwhile is not seen for so long."""


@dataclass
class _Demand:
    """Who waits for more of a unit, and when more was last refused."""

    waiting: list[int] = field(default_factory=list)
    refused: int | None = None
    """Nobody gets so much or more, until then."""
    refused_until_s: float = 0.0
    free_at_s: float = 0.0
    left: int | None = None
    """What nobody had leased at the last exchange."""

    def is_refused(self, amount: int, now_s: float) -> bool:
        return self.refused is not None and amount >= self.refused and now_s < self.refused_until_s


@dataclass
class _Slice:
    """What may be spent of a minute's limit."""

    slot: int = 0
    left: int = 0
    ends_at_s: float = 0.0
    spent: int = 0
    """Since the last exchange."""
    returns: dict[int, int] = field(default_factory=dict)


@dataclass
class _Hold:
    """What the database knows this replica to hold of something that comes back."""

    granted: int = 0
    in_use: int = 0
    spent: int = 0
    """Tokens that were used and are not in the ledger for sure."""
    handed_in: int = 0
    """The part of `spent` in the meter's undelivered batch."""
    taken: int = 0
    """Since the last exchange."""


class Account:
    """The leases of one limited tenant."""

    def __init__(self, tenant: str, limits: TenantLimits) -> None:
        self.tenant = tenant
        self.limits = limits
        self.num_reserved = 0
        """Reservations that are not settled."""
        self.is_in_doubt = False
        """Whether what the database took of the last ask is not known."""
        self._slices: dict[Rate, _Slice] = {rate: _Slice() for rate in RATES}
        self._holds: dict[Holding, _Hold] = {unit: _Hold() for unit in HOLDINGS}
        self._demands: dict[Unit, _Demand] = {unit: _Demand() for unit in (*RATES, *HOLDINGS)}

    @property
    def is_idle(self) -> bool:
        """Whether it may be forgotten."""
        return not (
            self.num_reserved
            or self.is_in_doubt
            or any(demand.waiting for demand in self._demands.values())
            or any(each.left or each.returns for each in self._slices.values())
            or any(hold.granted or hold.spent for hold in self._holds.values())
        )

    def take_rate(self, rate: Rate, amount: int, now_s: float) -> int | None:
        """Spend of a minute's limit; returns the slot it counts in, None if there is too little."""
        found = self._slices[rate]
        if found.left < amount or now_s >= found.ends_at_s:
            return None
        found.left -= amount
        found.spent += amount
        return found.slot

    def return_rate(self, rate: Rate, slot: int, amount: int, now_s: float) -> None:
        """Give back what was taken in `slot` and not needed."""
        found = self._slices[rate]
        if slot == found.slot and now_s < found.ends_at_s:
            found.left += amount
        elif amount:
            found.returns[slot] = found.returns.get(slot, 0) + amount

    def hold(self, unit: Holding, amount: int) -> bool:
        """Take of what comes back; False if there is too little."""
        found = self._holds[unit]
        if found.granted - found.in_use - found.spent < amount:
            return False
        found.in_use += amount
        found.taken += amount
        return True

    def let_go(self, unit: Holding, amount: int, *, spent: int = 0) -> None:
        """Give back what was held, of which `spent` will be in the ledger."""
        found = self._holds[unit]
        found.in_use -= amount
        found.spent += spent

    def wait(self, unit: Unit, amount: int) -> None:
        """The next exchange is to bring so much more."""
        self._demands[unit].waiting.append(amount)

    def stop_waiting(self, unit: Unit, amount: int) -> None:
        self._demands[unit].waiting.remove(amount)

    def refuse_if_known(self, unit: Unit, amount: int, now_s: float) -> None:
        """Raises RateLimitedError while there is known to be too little."""
        if self._demands[unit].is_refused(amount, now_s):
            raise self.refusal(unit, now_s)

    def require_possible(self, unit: Unit, amount: int) -> None:
        """Raises InputError for what the limit never has room for."""
        limit = self.limits.of(unit)
        if limit is not None and amount > limit:
            raise InputError(
                f"the prompt and max_tokens make {amount} tokens, tenant '{self.tenant}' has "
                f"{limit} {_per(unit)}",
                hint="shorten the prompt or lower max_tokens",
                param="max_tokens",
            )

    def refusal(self, unit: Unit, now_s: float) -> RateLimitedError:
        """Why more of `unit` is refused, and for how long."""
        limit, wait_s = self.limits.of(unit), max(1.0, self._demands[unit].free_at_s - now_s)
        if unit == "month_tokens":
            return QuotaExceededError(
                f"tenant '{self.tenant}' has used or reserved its {limit} {_per(unit)}",
                hint="ask the operator for more, or wait",
                unit="tokens",
                retry_after_s=wait_s,
            )
        what = "streams open" if unit == "streams" else f"{unit} {_per(unit)}"
        return RateLimitedError(
            f"tenant '{self.tenant}' has reached its limit of {limit} {what}",
            hint=f"try again in {math.ceil(wait_s)} s",
            unit=unit,
            retry_after_s=wait_s,
        )

    def ask(self, now_s: float, *, hands_in: bool) -> Ask:
        """What to ask of the database now.

        Args:
            hands_in: all that was spent so far is in a new batch, which goes with it.
        """
        needs: dict[Unit, int] = {}
        wants: dict[Unit, int] = {}
        returns: dict[Rate, dict[int, int]] = {}
        keeps: dict[Holding, int] = {}
        for rate, found in self._slices.items():
            limit = self.limits.of(rate)
            if now_s >= found.ends_at_s:
                self._put_back(found)
            if limit is not None and (needed := self._needed(rate, limit, found.spent)):
                needs[rate], wants[rate] = needed
            # Never handed in twice: that would make room that is not there.
            returns[rate], found.returns = found.returns, {}
            found.spent = 0
        self.is_in_doubt = True
        for unit, held in self._holds.items():
            limit = self.limits.of(unit)
            if hands_in:
                held.handed_in = held.spent
            free = held.granted - held.in_use - held.spent
            wanted = 0
            if limit is not None and (needed := self._needed(unit, limit, held.taken)):
                needs[unit], wanted = needed
            keep_free = max(0, min(free, wanted))
            held.granted = held.in_use + held.spent + keep_free
            keeps[unit] = held.granted - held.handed_in
            if wanted > keep_free:
                wants[unit] = wanted - keep_free
                needs[unit] = max(0, needs[unit] - keep_free)
            else:
                needs.pop(unit, None)
            held.taken = 0
        return Ask(needs, wants, returns, keeps)

    def apply(self, lease: Lease, *, asked_at_s: float) -> None:
        """Take what was granted; what was handed in with the ask is in the ledger."""
        self.is_in_doubt = False
        for unit, demand in self._demands.items():
            demand.left = lease.left.get(unit)
            if lease.granted.get(unit):
                demand.refused = None
            elif unit in lease.retry_after_s and demand.waiting:
                demand.refused = min(demand.waiting)
                demand.free_at_s = asked_at_s + lease.retry_after_s[unit]
                demand.refused_until_s = min(demand.free_at_s, asked_at_s + _REMEMBER_REFUSAL_S)
        for rate, found in self._slices.items():
            # A limit that is gone is in no lease.
            if amount := lease.granted.get(rate, sum(self._demands[rate].waiting)):
                self._put_back(found)
                found.slot, found.left = lease.slot, amount
                found.ends_at_s = asked_at_s + LEASE_S
        for unit, held in self._holds.items():
            more = lease.granted.get(unit, sum(self._demands[unit].waiting))
            held.granted += more - held.handed_in
            held.spent -= held.handed_in
            held.handed_in = 0

    def headers(self, now_s: float) -> list[tuple[bytes, bytes]]:
        """`x-ratelimit-…` of what is limited by the minute."""
        headers: list[tuple[bytes, bytes]] = []
        for rate in RATES:
            limit = self.limits.of(rate)
            if limit is None:
                continue
            found, elsewhere = self._slices[rate], self._demands[rate].left
            remaining = limit if elsewhere is None else min(limit, elsewhere + found.left)
            counts_until_s = (found.slot + 1) * SLOT_S + WINDOW_S + LEASE_S
            reset_s = max(1, math.ceil(counts_until_s - now_s)) if remaining < limit else 0
            for name, value in (
                ("limit", str(limit)),
                ("remaining", str(remaining)),
                ("reset", f"{reset_s}s"),
            ):
                headers.append((f"x-ratelimit-{name}-{rate}".encode(), value.encode()))
        return headers

    def _needed(self, unit: Unit, limit: int, spent: int) -> tuple[int, int] | None:
        """What the first who waits needs, and what would do for a while; None for nothing."""
        waiting = self._demands[unit].waiting
        if not waiting and not spent:
            return None
        # Streams are few and long: none is kept ahead, where another replica may need it.
        ahead = 0 if unit == "streams" else min(2 * spent, limit // _SHARE_AHEAD)
        if unit == "requests":
            ahead = max(ahead, limit // WINDOW_S)
        return min(waiting, default=0), max(sum(waiting), ahead)

    def _put_back(self, found: _Slice) -> None:
        if found.left:
            found.returns[found.slot] = found.returns.get(found.slot, 0) + found.left
            found.left = 0


def _per(unit: Unit) -> str:
    return "tokens this month" if unit == "month_tokens" else "per minute"
