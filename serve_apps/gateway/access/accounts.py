"""Exchanges with the database: hands in what was used, leases what may be, off the hot path.

One exchange at a time, in a thread: about every second where there is anything to tell, at once
where somebody waits for a lease.

    accounts = Accounts(store.exchange)
    await accounts.start()
    slot = await accounts.take_rate(accounts.of(identity), "requests", 1)
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from cluster.errors import OverloadedError, first_line
from cluster.ledger import Entry
from cluster.security.api_keys import Identity
from cluster.security.limits import Ask, Holding, Lease, Rate, Unit
from serve_apps.gateway.access.limits import Account
from serve_apps.gateway.access.metering import UsageMeter

logger = logging.getLogger(__name__)

_PERIOD_S = 0.8
"""With a slow exchange, still within the second that a lease lasts and usage may be lost."""

_PATIENCE_S = 5.0
"""With a database that is silent."""

Exchange = Callable[[str, Sequence[Entry], Mapping[str, Ask]], Mapping[str, Lease]]
"""Takes the replica's name, entries and asks by tenant; blocking."""


class Accounts:
    """What this replica leases for each limited tenant, and meters for all."""

    def __init__(self, exchange: Exchange, *, clock: Callable[[], float] = time.time) -> None:
        self.replica = f"gateway/{uuid.uuid4().hex[:12]}"
        self.meter = UsageMeter(self.replica)
        self.clock = clock
        self._exchange = exchange
        # Of its own: limited tenants wait for it, whatever keeps the threads that all share busy.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="accounts")
        self._accounts: dict[str, Account] = {}
        self._wanted = asyncio.Event()
        self._next: asyncio.Future[None] | None = None
        self._flushed_at_s = -math.inf
        self._task: asyncio.Task[None] | None = None
        self._is_failing = False
        self._is_stopping = False

    def of(self, identity: Identity) -> Account:
        """The account of a limited tenant."""
        account = self._accounts.get(identity.tenant)
        if account is None:
            account = Account(identity.tenant, identity.limits)
            self._accounts[identity.tenant] = account
        account.limits = identity.limits
        return account

    async def start(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Hand in what is left."""
        self._is_stopping = True
        self._wanted.set()
        if self._task is not None:
            await self._task
            self._task = None
        # A batch that is in doubt first, then what came meanwhile.
        for _ in range(2):
            await self.exchange(flushes=True)

    async def take_rate(self, account: Account, rate: Rate, amount: int) -> int:
        """Spend of a minute's limit; returns the slot it counts in.

        Raises:
            RateLimitedError: there is too little now.
            InputError: there is never so much.
        """
        slot = account.take_rate(rate, amount, self.clock())
        while slot is None:
            await self._more(account, rate, amount)
            slot = account.take_rate(rate, amount, self.clock())
        return slot

    async def hold(self, account: Account, unit: Holding, amount: int) -> None:
        """Take of what comes back; raises as `take_rate` does."""
        while not account.hold(unit, amount):
            await self._more(account, unit, amount)

    async def _more(self, account: Account, unit: Unit, amount: int) -> None:
        """Wait for an exchange that brings more, or know that there is none."""
        account.require_possible(unit, amount)
        account.refuse_if_known(unit, amount, self.clock())
        if self._next is None:
            self._next = asyncio.get_running_loop().create_future()
        self._wanted.set()
        account.wait(unit, amount)
        try:
            async with asyncio.timeout(_PATIENCE_S):
                await asyncio.shield(self._next)
        except TimeoutError:
            raise _unreadable() from None
        finally:
            account.stop_waiting(unit, amount)
        account.refuse_if_known(unit, amount, self.clock())

    async def _run(self) -> None:
        while not self._is_stopping:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_PERIOD_S):
                    await self._wanted.wait()
            await self.exchange(flushes=time.monotonic() - self._flushed_at_s >= _PERIOD_S)

    async def exchange(self, *, flushes: bool) -> None:
        """One exchange; those who wait are answered, whatever comes of it."""
        self._wanted.clear()
        waiters, self._next = self._next, None
        if flushes:
            self._flushed_at_s = time.monotonic()
        try:
            now_s = self.clock()
            is_repeated = self.meter.has_undelivered
            entries = self.meter.batch() if flushes or is_repeated else ()
            hands_in = bool(entries) and not is_repeated
            active = {name: each for name, each in self._accounts.items() if not each.is_idle}
            asks = {name: each.ask(now_s, hands_in=hands_in) for name, each in active.items()}
            if entries or asks:
                leases = await asyncio.get_running_loop().run_in_executor(
                    self._thread, self._exchange, self.replica, entries, asks
                )
                self.meter.delivered()
                if is_repeated:  # what came meanwhile has waited long enough
                    self._flushed_at_s = -math.inf
                    self._wanted.set()
                for tenant, lease in leases.items():
                    active[tenant].apply(lease, asked_at_s=now_s)
            self._forget_idle()
            self._is_failing = False
        # Whatever the database raises: it is asked again, under the same keys.
        except Exception as error:
            if not self._is_failing:
                logger.warning("limits and usage wait for the database: %s", first_line(error))
            self._is_failing = True
            if waiters is not None:
                waiters.set_exception(_unreadable())
                waiters.exception()  # those who waited may have left
        else:
            if waiters is not None:
                waiters.set_result(None)

    def _forget_idle(self) -> None:
        for tenant in [name for name, account in self._accounts.items() if account.is_idle]:
            del self._accounts[tenant]


def _unreadable() -> OverloadedError:
    return OverloadedError("the tenant's limits cannot be read now", hint="try again in a moment")
