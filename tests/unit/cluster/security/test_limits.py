"""The policy alone: what is granted, for how long it counts, who holds what."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from cluster.security.limits import (
    HOLDING_S,
    LEASE_S,
    SLOT_S,
    WINDOW_S,
    Ask,
    Budget,
    TenantLimits,
    decide,
    month_of,
    seconds_to_next_month,
)

START_S = 1_700_000_000.0
TEN = TenantLimits(requests_per_minute=10)


@pytest.mark.parametrize(
    ("taken", "need", "want", "granted", "left"),
    [
        (0, 1, 4, 4, 6),
        (0, 1, 40, 10, 0),
        (8, 1, 4, 2, 0),
        (8, 3, 4, 0, 2),  # less than is needed would only be kept from others
        (10, 1, 4, 0, 0),
        (0, 0, 0, 0, 10),
        (9, 0, 4, 1, 0),
    ],
)
def test_a_slice_is_what_there_is_unless_that_is_too_little(
    taken: int, need: int, want: int, granted: int, left: int
) -> None:
    budget = Budget(slots={"requests": {int(START_S // SLOT_S): taken}})
    ask = Ask(needs={"requests": need}, wants={"requests": want})
    after, lease = decide(budget, TEN, ask, holder="a", now_s=START_S)
    assert (lease.granted["requests"], lease.left["requests"]) == (granted, left)
    assert sum(after.slots.get("requests", {}).values()) == taken + granted
    assert ("requests" in lease.retry_after_s) == (granted < need)


def test_a_slice_counts_until_nothing_spent_of_it_can_be_in_the_last_minute() -> None:
    ask = Ask(needs={"requests": 10})
    budget, _ = decide(Budget(), TEN, ask, holder="a", now_s=START_S)
    last_spent_s = START_S + LEASE_S
    for later_s in (1.0, WINDOW_S - 0.1, WINDOW_S + LEASE_S - 0.1):
        _, lease = decide(budget, TEN, ask, holder="b", now_s=START_S + later_s)
        assert lease.granted["requests"] == 0
        again_s = START_S + later_s + lease.retry_after_s["requests"]
        assert last_spent_s + WINDOW_S <= again_s <= last_spent_s + WINDOW_S + SLOT_S
        _, lease = decide(budget, TEN, ask, holder="b", now_s=again_s)
        assert lease.granted["requests"] == 10


def test_what_is_given_back_can_be_leased_again() -> None:
    budget, first = decide(Budget(), TEN, Ask(needs={"requests": 10}), holder="a", now_s=START_S)
    returned = Ask(returns={"requests": {first.slot: 4}})
    budget, _ = decide(budget, TEN, returned, holder="a", now_s=START_S + 5)
    ask = Ask(needs={"requests": 1}, wants={"requests": 9})
    _, lease = decide(budget, TEN, ask, holder="b", now_s=START_S + 5)
    assert lease.granted["requests"] == 4


def test_a_clock_that_was_an_hour_ahead_shuts_nobody_out() -> None:
    ask = Ask(needs={"requests": 10})
    budget, _ = decide(Budget(), TEN, ask, holder="a", now_s=START_S + 3600)
    _, lease = decide(budget, TEN, ask, holder="b", now_s=START_S)
    assert lease.granted["requests"] == 10


def test_streams_are_held_until_let_go_or_the_replica_falls_silent() -> None:
    limits = TenantLimits(max_streams=3)
    one_more = Ask(needs={"streams": 1})
    budget, _ = decide(Budget(), limits, Ask(needs={"streams": 2}), holder="a", now_s=START_S)
    budget, lease = decide(budget, limits, one_more, holder="b", now_s=START_S)
    assert (lease.granted["streams"], lease.left["streams"]) == (1, 0)
    kept = Ask(needs={"streams": 1}, keeps={"streams": 1})
    _, lease = decide(budget, limits, kept, holder="b", now_s=START_S + 1)
    assert lease.granted["streams"] == 0
    let_go, _ = decide(budget, limits, Ask(), holder="a", now_s=START_S + 1)
    _, lease = decide(let_go, limits, kept, holder="b", now_s=START_S + 1)
    assert lease.granted["streams"] == 1
    _, lease = decide(budget, limits, kept, holder="b", now_s=START_S + HOLDING_S)
    assert lease.granted["streams"] == 1


def test_what_is_in_use_is_kept_when_the_limit_falls_below_it() -> None:
    ask = Ask(needs={"streams": 1}, keeps={"streams": 5})
    budget, lease = decide(Budget(), TenantLimits(max_streams=3), ask, holder="a", now_s=START_S)
    assert lease.granted["streams"] == 0
    assert budget.holders["a"].amounts["streams"] == 5


def test_a_month_holds_what_is_settled_and_what_is_reserved() -> None:
    limits = TenantLimits(monthly_tokens=100)
    budget = Budget(month="2023-11", month_tokens=60)
    budget, lease = decide(
        budget, limits, Ask(needs={"month_tokens": 30}), holder="a", now_s=START_S
    )
    assert lease.granted["month_tokens"] == 30
    ask = Ask(needs={"month_tokens": 11})
    _, lease = decide(budget, limits, ask, holder="b", now_s=START_S)
    assert lease.retry_after_s["month_tokens"] == 1.0  # what is reserved may come back
    spent = Budget(month="2023-11", month_tokens=90)
    _, lease = decide(spent, limits, ask, holder="b", now_s=START_S)
    assert lease.retry_after_s["month_tokens"] == seconds_to_next_month(START_S)


def test_months_are_those_of_utc() -> None:
    last_s = datetime(2026, 12, 31, 23, 59, 58, tzinfo=UTC).timestamp()
    assert month_of(last_s) == "2026-12"
    assert seconds_to_next_month(last_s) == 2.0
    assert month_of(last_s + 2) == "2027-01"
