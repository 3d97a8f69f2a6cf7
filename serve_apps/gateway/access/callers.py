"""Who a request is from, for whatever answers it: which models, within which limits, on whose bill.

Every door sets the caller once it knows the key; `Models` asks for it, so a protocol needs no line
of its own, and what reaches a model without a caller is refused.

    callers = Callers(accounts)
    caller = callers.make(identity)
    await caller.count_request()                  # raises RateLimitedError
    with caller.entered():
        current_caller().answered("inference", served)
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable
from contextvars import ContextVar, Token

from cluster.errors import AuthenticationError, NotFoundError
from cluster.ledger import COMPLETION, INFERENCE
from cluster.security.api_keys import Identity
from cluster.security.limits import Holding
from serve_apps.gateway.access.accounts import Accounts
from serve_apps.gateway.access.limits import Account
from serve_apps.gateway.access.reservations import Prompt, Reservation
from serve_apps.gateway.routing_table import ServedVersion
from serve_apps.llm.engine import EngineRequest, TokenOutput

_caller: ContextVar[Caller] = ContextVar("caller")

Session = Callable[[], str]
"""Empty where the request names none."""
Settle = Callable[[bool], None]
"""Told whether the answer counts."""


class Caller:
    """The sender of one request."""

    __slots__ = (
        "_accounts", "_held", "_is_counted", "_prompts", "_session", "identity", "is_limited",
        "user",
    )  # fmt: skip

    def __init__(self, identity: Identity, accounts: Accounts, session: Session = str) -> None:
        self.identity = identity
        self.is_limited = identity.limits.is_limited
        self.user = ""
        """Who the request says that it is made for."""
        self._accounts = accounts
        self._session = session
        self._held: list[Settle] | None = None
        self._is_counted = False
        self._prompts: dict[tuple[int, ...], Prompt] = {}

    def entered(self) -> _Entered:
        """Be the current caller within a block."""
        return _Entered(self)

    def customer(self) -> str:
        """Who stays with one version: a session, or a user, of the tenant's, or else the tenant."""
        return f"{self.identity.tenant}\n{self._session() or self.user}"

    def hold_bill(self) -> None:
        """What is answered from now on is charged only once `settle_bill` says so."""
        self._held = []

    def settle_bill(self, *, counts: bool) -> None:
        """Charge what was held, or, where it never reached the customer, forget it."""
        held, self._held = self._held or [], None
        if not counts:
            self._prompts.clear()
        for settle in held:
            settle(counts)

    def settle_once_sure(self, settle: Settle) -> None:
        """Now, or when the bill is settled."""
        if self._held is None:
            settle(True)
        else:
            self._held.append(settle)

    async def count_request(self) -> None:
        """Spend one request of the tenant's minute. Raises RateLimitedError if there is none."""
        if self.identity.limits.requests_per_minute is not None:
            await self._accounts.take_rate(self._account, "requests", 1)

    def limit_headers(self) -> list[tuple[bytes, bytes]]:
        """`x-ratelimit-…`, where the tenant is limited."""
        return self._account.headers(self._accounts.clock()) if self.is_limited else []

    def require_model(self, name: str) -> None:
        """Raises NotFoundError if the key is not for this model, whether it is there or not."""
        if not self.identity.may_use(name):
            raise self.no_such_model(name)

    def no_such_model(self, name: str) -> NotFoundError:
        """What a key for some models is told of all that it cannot reach."""
        allowed = ", ".join(sorted(self.identity.models or ()))
        return NotFoundError(
            f"model '{name}' is not deployed, or not for this key, which is for: {allowed}",
            hint="ask the operator",
            param="model",
        )

    def answered(
        self,
        kind: str,
        served: ServedVersion,
        *,
        prompt_tokens: int = 0,
        completion_tokens: int = 0,
    ) -> None:
        """Put an answer on the bill; several to one request are one request."""
        self._accounts.meter.add(
            self.identity,
            kind,
            served,
            num_requests=0 if self._is_counted else 1,
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
        )
        self._is_counted = True

    async def reserve(self, num_tokens: int, *, is_stream: bool = True) -> Reservation | None:
        """Set aside what an answer may use; None for a tenant without limits.

        Raises:
            RateLimitedError: the tenant has too little left.
            InputError: it never has so much.
        """
        if not self.is_limited:
            return None
        account = self._account
        holds: dict[Holding, int] = {}
        slot: int | None = None
        account.num_reserved += 1
        try:
            amounts: dict[Holding, int] = {"streams": int(is_stream), "month_tokens": num_tokens}
            for unit, amount in amounts.items():
                if amount and account.limits.of(unit) is not None:
                    await self._accounts.hold(account, unit, amount)
                    holds[unit] = amount
            if num_tokens and account.limits.tokens_per_minute is not None:
                slot = await self._accounts.take_rate(account, "tokens", num_tokens)
        except BaseException:
            self.settle(Reservation(account, num_tokens, slot, holds), 0)
            raise
        return Reservation(account, num_tokens, slot, holds)

    def settle(self, reservation: Reservation, num_used: int) -> None:
        """Give back what an answer did not use."""
        account = reservation.account
        account.num_reserved -= 1
        for unit, amount in reservation.holds.items():
            account.let_go(unit, amount, spent=num_used if unit == "month_tokens" else 0)
        if reservation.slot is not None:
            unused = reservation.max_tokens - num_used
            account.return_rate("tokens", reservation.slot, unused, self._accounts.clock())

    @property
    def _account(self) -> Account:
        """Looked up each time: one that is idle is forgotten, and made anew."""
        return self._accounts.of(self.identity)

    def prompt(self, prompt_ids: tuple[int, ...]) -> Prompt:
        """The same one for the same tokens."""
        return self._prompts.setdefault(prompt_ids, Prompt(len(prompt_ids)))

    async def reserve_answer(self, prompt: Prompt, max_tokens: int) -> Reservation | None:
        """As `reserve`, the prompt's tokens included unless another answer has set them aside."""
        num_prompt = 0 if prompt.is_reserved else prompt.num_tokens
        prompt.is_reserved = True
        prompt.num_open += 1
        try:
            reservation = await self.reserve(num_prompt + max_tokens)
        except BaseException:
            prompt.is_reserved = not num_prompt
            self.settle_prompt(prompt, counts=False)
            raise
        if reservation is not None and num_prompt:
            prompt.reservation, reservation = reservation.split(num_prompt)
        return reservation

    def settle_prompt(self, prompt: Prompt, *, counts: bool) -> int:
        """An answer to it has ended; the tokens to charge for the prompt with this one."""
        prompt.num_open -= 1
        num_tokens = prompt.num_tokens if counts and not prompt.is_charged else 0
        prompt.is_charged |= counts
        is_over = prompt.is_charged or not prompt.num_open
        if is_over and prompt.reservation is not None:
            self.settle(prompt.reservation, num_tokens)
            prompt.reservation = None
        if not prompt.num_open:
            prompt.is_reserved = prompt.is_charged
        return num_tokens


class _Entered:
    """As a class, for it is on every request's way: a generator costs three times as much."""

    __slots__ = ("_caller", "_token")

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    def __enter__(self) -> None:
        self._token: Token[Caller] = _caller.set(self._caller)

    def __exit__(self, *_error: object) -> None:
        _caller.reset(self._token)


class Callers:
    """Makes the caller of each request."""

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts

    def make(self, identity: Identity, session: Session = str) -> Caller:
        """`session` names the customer within the tenant, if the request does."""
        return Caller(identity, self._accounts, session)


def current_caller() -> Caller:
    """Raises AuthenticationError where no door has let anybody in."""
    caller = _caller.get(None)
    if caller is None:
        raise AuthenticationError("nobody was let in here", hint="this is a mistake of the gateway")
    return caller


def answered(served: ServedVersion) -> None:
    """A graph has answered the current caller."""
    caller = current_caller()

    def settle(is_sure: bool) -> None:
        if is_sure:
            caller.answered(INFERENCE, served)

    caller.settle_once_sure(settle)


@contextlib.asynccontextmanager
async def reading_tokens(served: ServedVersion, num_tokens: int) -> AsyncGenerator[None, None]:
    """Around the calls of a graph that reads so many tokens: reserved before, settled after.

    Raises:
        RateLimitedError: the current caller's tenant has too little left.
    """
    caller = current_caller()
    reservation = await caller.reserve(num_tokens, is_stream=False)
    is_read = False

    def settle(is_sure: bool) -> None:
        counts = is_read and is_sure
        if counts:
            caller.answered(INFERENCE, served, prompt_tokens=num_tokens)
        if reservation is not None:
            caller.settle(reservation, num_tokens if counts else 0)

    try:
        yield
        is_read = True
    finally:
        caller.settle_once_sure(settle)


async def metered(
    served: ServedVersion, request: EngineRequest, outputs: AsyncGenerator[TokenOutput, None]
) -> AsyncGenerator[TokenOutput, None]:
    """The same tokens, reserved before the first and settled after the last, however it ends.

    Raises:
        RateLimitedError: the current caller's tenant has too little left.
    """
    caller = current_caller()
    prompt = caller.prompt(request.prompt_ids)
    reservation = await caller.reserve_answer(prompt, request.sampling.max_tokens)
    num_given, has_begun = 0, False

    def settle(is_sure: bool) -> None:
        # Nothing given, nothing charged.
        counts = has_begun and is_sure
        read = caller.settle_prompt(prompt, counts=counts)
        given = num_given if counts else 0
        if reservation is not None:
            caller.settle(reservation, given)
        if counts:
            caller.answered(COMPLETION, served, prompt_tokens=read, completion_tokens=given)

    try:
        async for output in outputs:
            has_begun = True
            num_given += len(output.token_ids)
            yield output
    finally:
        caller.settle_once_sure(settle)
        await outputs.aclose()
