"""On whose bill a prediction is, and that no more is put on it than a customer may still spend.

As live requests do, rows reserve what they may use at most before they are answered, and what they
did use is settled after: so what is answered at once anywhere never exceeds a month's budget.

    budget = open_budget(config, settings)
    with budget.reserved([120, 300]) as num_rows:    # of these, so many have room
        budget.spend(95)
    budget.settle(bill.entry(summary, seconds, config))
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from cluster.database import open_database
from cluster.errors import first_line
from cluster.ledger import Entry
from cluster.predictions import PartSummary
from cluster.security.leases import LeaseStore
from cluster.security.limits import HOLDING_S, Ask, Holding, Lease
from cluster.settings import Settings
from jobs.prediction.config import PredictConfig

KIND = "prediction"
PATIENCE_S = 30.0
"""Where others hold what is left of a budget, so long may they take to give some of it back."""
_RENEW_S = HOLDING_S / 4
_MONTH: Holding = "month_tokens"

_logger = logging.getLogger(__name__)

Exchange = Callable[[str, Sequence[Entry], Mapping[str, Ask]], Mapping[str, Lease]]
"""As LeaseStore.exchange."""


@dataclass(frozen=True)
class Bill:
    """What an entry of this prediction says beside its figures."""

    id: str
    """Of the output, so that a part counts once however often its job is started."""
    run_id: str
    model: str
    version: int

    def entry(self, summary: PartSummary, seconds: float, config: PredictConfig) -> Entry:
        """A part of it."""
        return Entry(
            key=f"{KIND}/{self.id}/{summary.number}",
            tenant=config.tenant,
            kind=KIND,
            model=self.model,
            source=config.api_key_id or self.run_id,
            cpu_s=seconds * config.num_threads,
            gpu_s=seconds * config.num_gpus,
            prompt_tokens=summary.prompt_tokens,
            completion_tokens=summary.completion_tokens,
            version=self.version,
            num_requests=summary.num_rows,
        )


class Budget(Protocol):
    """What may be spent."""

    def reserved(self, amounts: Sequence[int]) -> AbstractContextManager[int]:
        """How many of the first rows have room, with so many tokens each at most; what they need
        is theirs within the block."""

    def spend(self, num_tokens: int) -> None:
        """So many were used, within the block."""

    def settle(self, entry: Entry) -> None:
        """The entry has all that was spent since the last one."""


class Unlimited:
    """A budget for those who answer to nobody."""

    @contextlib.contextmanager
    def reserved(self, amounts: Sequence[int]) -> Iterator[int]:
        yield len(amounts)

    def spend(self, num_tokens: int) -> None:
        pass

    def settle(self, entry: Entry) -> None:
        pass


class TenantBudget:
    """The tokens that a tenant has left of its month, shared with its live requests."""

    def __init__(self, exchange: Exchange, tenant: str, *, patience_s: float = PATIENCE_S) -> None:
        self._exchange = exchange
        self._tenant = tenant
        self._patience_s = patience_s
        self._holder = f"job/{uuid.uuid4().hex[:12]}"
        self._spent = 0
        """Tokens that are in no entry yet."""
        self._is_empty = False

    @contextlib.contextmanager
    def reserved(self, amounts: Sequence[int]) -> Iterator[int]:
        """See `Budget`. Once one row had no room, the rows after it have none either."""
        num_rows = self._reserve(amounts)
        num_tokens = self._spent + sum(amounts[:num_rows])
        if num_rows < len(amounts):
            self._keep(num_tokens)  # not what is too little for another row
        with self._renewed(num_tokens):
            yield num_rows

    def spend(self, num_tokens: int) -> None:
        self._spent += num_tokens

    def settle(self, entry: Entry) -> None:
        """In one transaction, so that what was spent is either held or in the ledger."""
        self._exchange(self._holder, [entry], {self._tenant: Ask()})
        self._spent = 0

    def _reserve(self, amounts: Sequence[int]) -> int:
        total, until_s = sum(amounts), time.monotonic() + self._patience_s
        while not self._is_empty:
            lease = self._ask(
                Ask(
                    needs={_MONTH: amounts[0]},
                    wants={_MONTH: total},
                    keeps={_MONTH: self._spent},
                    spent=self._spent,
                )
            )
            # Who has no limit, or is no tenant that anybody limits, is granted nothing by name.
            granted = total if lease is None else lease.granted.get(_MONTH, total)
            if granted >= amounts[0]:
                return sum(needed <= granted for needed in itertools.accumulate(amounts))
            assert lease is not None
            wait_s = lease.retry_after_s[_MONTH]
            self._is_empty = time.monotonic() + wait_s > until_s
            if not self._is_empty:
                time.sleep(wait_s)
        return 0

    @contextlib.contextmanager
    def _renewed(self, num_tokens: int) -> Iterator[None]:
        """They are held within the block, however long it takes."""
        is_over = threading.Event()

        def renew() -> None:
            while not is_over.wait(_RENEW_S):
                try:
                    self._keep(num_tokens)
                # Whatever the database raises: it is asked again.
                except Exception as error:
                    _logger.warning("reserved tokens wait for the database: %s", first_line(error))

        thread = threading.Thread(target=renew, daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()

    def _keep(self, num_tokens: int) -> None:
        self._ask(Ask(keeps={_MONTH: num_tokens}))

    def _ask(self, ask: Ask) -> Lease | None:
        return self._exchange(self._holder, (), {self._tenant: ask}).get(self._tenant)


def open_budget(config: PredictConfig, settings: Settings) -> Budget:
    """The tenant's, where a key of it is charged; the operator's own jobs are only counted."""
    if not config.api_key_id:
        return Unlimited()
    return TenantBudget(LeaseStore(open_database(settings.database)).exchange, config.tenant)
