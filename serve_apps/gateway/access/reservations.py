"""What a request may use at most, set aside before it is answered.

prompt, answer = reservation.split(num_prompt_tokens)
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from cluster.security.limits import Holding
from serve_apps.gateway.access.limits import Account


@dataclass(frozen=True)
class Reservation:
    """What one answer may use at most."""

    account: Account
    max_tokens: int
    slot: int | None
    """That its tokens count in, where they are limited by the minute."""
    holds: dict[Holding, int]

    def split(self, num_tokens: int) -> tuple[Reservation, Reservation]:
        """So many of its tokens, and the rest; each is settled by itself."""
        self.account.num_reserved += 1
        part: dict[Holding, int] = {}
        rest = dict(self.holds)
        if "month_tokens" in rest:
            part["month_tokens"] = num_tokens
            rest["month_tokens"] -= num_tokens
        return (
            dataclasses.replace(self, max_tokens=num_tokens, holds=part),
            dataclasses.replace(self, max_tokens=self.max_tokens - num_tokens, holds=rest),
        )


@dataclass
class Prompt:
    """A prompt of one request: it counts once, however many answers to it are asked for, and for
    whichever of them begins."""

    num_tokens: int
    num_open: int = 0
    """Answers that are not settled."""
    is_reserved: bool = False
    reservation: Reservation | None = None
    """Until its tokens are charged, or no answer is left that could be."""
    is_charged: bool = False
