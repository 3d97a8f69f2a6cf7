"""What is settled is what was answered, whatever happens to clients, models, gateways and SQL."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.database import budgets, open_database
from cluster.errors import AuthenticationError, HeliostatError, UpstreamFailedError
from cluster.ledger import Entry, Ledger
from cluster.security.api_keys import ApiKeys, Identity
from cluster.security.leases import LeaseStore
from cluster.security.limits import HOLDING_S, TenantLimits
from serve_apps.gateway.access.accounts import Accounts
from serve_apps.gateway.access.callers import Caller, answered, metered
from serve_apps.gateway.access.metering import UsageMeter
from serve_apps.gateway.routing_table import ServedVersion
from serve_apps.llm.engine import EngineRequest, Sampling, TokenOutput

SERVED = ServedVersion("lm", 3, "sha256:0", "lm.v3")
GRAPH = ServedVersion("digits", 1, "sha256:1", "digits.v1")
MONTHLY_TOKENS = 60

End = Literal["complete", "client leaves", "client leaves between", "model dies"]
Fault = Literal["none", "before", "after"]


@dataclass(frozen=True)
class Life:
    """One request to the language model; `end` happens after so many of its outputs."""

    num_prompt_tokens: int
    outputs: tuple[int, ...]
    end: End
    after: int
    replica: int


@dataclass
class Answered:
    """What clients got, by the replica that they asked."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    unsettled: int = 0
    """Tokens since the last exchange that succeeded."""


lives = st.builds(
    Life,
    num_prompt_tokens=st.integers(1, 8),
    outputs=st.lists(st.integers(0, 4), min_size=1, max_size=5).map(tuple),
    end=st.sampled_from(["complete", "client leaves", "client leaves between", "model dies"]),
    after=st.integers(0, 5),
    replica=st.integers(0, 1),
)


@dataclass
class World:
    """Two gateway replicas on one database that now and then fails before or after it commits."""

    engine: sa.Engine
    faults: list[Fault]
    is_limited: bool
    now_s: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        limits = TenantLimits(
            monthly_tokens=MONTHLY_TOKENS if self.is_limited else None,
            tokens_per_minute=1000 if self.is_limited else None,
            max_streams=3 if self.is_limited else None,
        )
        ApiKeys(self.engine).set_tenant("acme", vars(limits))
        self.identity = Identity("key_1", "acme", frozenset({"infer"}), limits=limits)
        self.store = LeaseStore(self.engine, clock=lambda: self.now_s)
        self.replicas = [Accounts(self.exchange, clock=lambda: self.now_s) for _ in range(2)]
        self.answered = [Answered(), Answered()]

    def exchange(
        self, holder: str, entries: Sequence[Entry], asks: Mapping[str, Any]
    ) -> dict[str, Any]:
        fault = self.faults.pop() if self.faults else "none"
        if fault == "before":
            raise ConnectionError("gone")
        leases = self.store.exchange(holder, entries, asks)
        if fault == "after":
            raise ConnectionError("gone, and nobody knows")
        return leases

    async def live(self, life: Life) -> None:
        """A client's request, counted as the client sees it."""
        seen = self.answered[life.replica]
        request = EngineRequest(
            "r",
            tuple(range(life.num_prompt_tokens)),
            Sampling(max_tokens=max(1, sum(life.outputs))),
        )
        with Caller(self.identity, self.replicas[life.replica]).entered():
            stream = metered(SERVED, request, generate(life))
            num_outputs = 0
            try:
                async for output in stream:
                    if not num_outputs:
                        seen.requests += 1
                        seen.prompt_tokens += life.num_prompt_tokens
                        seen.unsettled += life.num_prompt_tokens
                    num_outputs += 1
                    seen.completion_tokens += len(output.token_ids)
                    seen.unsettled += len(output.token_ids)
                    if life.end == "client leaves between" and num_outputs >= life.after:
                        break
            except HeliostatError:
                pass
            finally:
                await stream.aclose()

    async def tick(self) -> None:
        for replica, seen in zip(self.replicas, self.answered, strict=True):
            await replica.exchange(flushes=True)
            if replica._wanted.is_set():
                await replica.exchange(flushes=True)
            if not replica._is_failing:
                seen.unsettled = 0

    def settled(self) -> tuple[int, int, int]:
        (total,) = Ledger(self.engine).totals() or (None,)
        if total is None:
            return (0, 0, 0)
        return (total.num_requests, total.prompt_tokens, total.completion_tokens)


async def generate(life: Life) -> AsyncGenerator[TokenOutput, None]:
    for number, size in enumerate(life.outputs):
        if number >= life.after:
            if life.end == "model dies":
                raise UpstreamFailedError("the replica went away")
            if life.end == "client leaves":
                await asyncio.Event().wait()  # the client goes while it waits
        await asyncio.sleep(0)
        yield TokenOutput("r", tuple(range(size)))


async def live_through(world: World, requests: list[Life]) -> None:
    tasks = [asyncio.create_task(world.live(life)) for life in requests]
    for _ in range(200):
        # A tick settles only what has ended: nothing runs while `unsettled` is reset.
        if all(task.done() for task in tasks):
            break
        for _ in range(30):
            await asyncio.sleep(0)
        for replica in world.replicas:
            if replica._wanted.is_set():
                await replica.exchange(flushes=True)
        stuck = [
            task
            for task, life in zip(tasks, requests, strict=True)
            if life.end == "client leaves" and not task.done()
        ]
        if stuck and not any(replica._wanted.is_set() for replica in world.replicas):
            stuck[0].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert all(task.done() for task in tasks)


@pytest.fixture(scope="module")
def directory() -> Any:
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


@settings(max_examples=60, deadline=None)
@given(
    rounds=st.lists(st.lists(lives, max_size=6), min_size=1, max_size=3),
    faults=st.lists(st.sampled_from(["none", "before", "after"]), max_size=8),
    is_limited=st.booleans(),
    is_killed=st.booleans(),
)
def test_settled_is_answered(
    directory: Path,
    empty_database: Path,
    rounds: list[list[Life]],
    faults: list[Fault],
    is_limited: bool,
    is_killed: bool,
) -> None:
    path = directory / "world.db"
    for old in directory.iterdir():
        old.unlink()
    shutil.copy(empty_database, path)
    engine = sa.create_engine(f"sqlite:///{path}")
    try:
        asyncio.run(check(World(engine, faults, is_limited), rounds, is_killed))
    finally:
        engine.dispose()


async def check(world: World, rounds: list[list[Life]], is_killed: bool) -> None:
    for requests in rounds:
        await live_through(world, requests)
        await world.tick()
    first, second = world.answered
    world.faults.clear()
    if is_killed:
        # kill -9: the first replica never hands in what it has, the second goes on.
        await world.replicas[1].stop()
        expected = sum(each.prompt_tokens + each.completion_tokens for each in world.answered)
        settled = sum(world.settled()[1:])
        assert expected - first.unsettled <= settled <= expected
    else:
        for replica in world.replicas:
            await replica.stop()
        assert world.settled() == (
            first.requests + second.requests,
            first.prompt_tokens + second.prompt_tokens,
            first.completion_tokens + second.completion_tokens,
        )
    if world.is_limited:
        check_budget(world, is_killed)


def check_budget(world: World, is_killed: bool) -> None:
    """A month's tokens are those of the ledger; nothing is held that nobody uses."""
    tokens = sum(world.settled()[1:])
    assert tokens <= MONTHLY_TOKENS
    world.now_s += HOLDING_S if is_killed else 0
    with world.engine.connect() as connection:
        row = connection.execute(sa.select(budgets)).one_or_none()
    if row is None:
        assert tokens == 0
        return
    assert row.month_tokens == tokens
    holders = [each for each in row.state["holders"].values() if each["expires_at_s"] > world.now_s]
    assert sum(each["amounts"]["streams"] for each in holders) == 0


async def test_a_graphs_answer_is_one_request_and_several_to_one_are_one(
    empty_database: Path, tmp_path: Path
) -> None:
    shutil.copy(empty_database, tmp_path / "world.db")
    engine = open_database(f"sqlite:///{tmp_path / 'world.db'}")
    world = World(engine, [], False)
    for num_answers in (1, 3):
        with Caller(world.identity, world.replicas[0]).entered():
            for _ in range(num_answers):
                answered(GRAPH)
    await world.tick()
    (total,) = Ledger(engine).totals(by=("version", "source"))
    assert (total.kind, total.model, total.num_requests) == ("inference", "digits", 2)
    assert (total.version, total.source) == (1, "key_1")


async def test_one_prompt_with_several_answers_counts_once(
    empty_database: Path, tmp_path: Path
) -> None:
    shutil.copy(empty_database, tmp_path / "world.db")
    engine = open_database(f"sqlite:///{tmp_path / 'world.db'}")
    world = World(engine, [], False)
    life = Life(5, (2, 1), "complete", 0, 0)
    with Caller(world.identity, world.replicas[0]).entered():
        for _ in range(3):
            request = EngineRequest("r", (1, 2, 3, 4, 5), Sampling(max_tokens=8))
            assert [output async for output in metered(SERVED, request, generate(life))]
    await world.tick()
    assert world.settled() == (1, 5, 9)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
@pytest.mark.parametrize("broken", [(0,), (1,), (0, 2), (0, 1, 2)])
async def test_a_prompt_counts_once_whichever_answer_to_it_begins(
    empty_database: Path, tmp_path: Path, broken: tuple[int, ...], order: tuple[int, ...]
) -> None:
    shutil.copy(empty_database, tmp_path / "world.db")
    engine = open_database(f"sqlite:///{tmp_path / 'world.db'}")
    world = World(engine, [], True)
    lives = [
        Life(5, (2, 1), "model dies" if number in broken else "complete", 0, 0)
        for number in range(3)
    ]
    accounts, request = world.replicas[0], EngineRequest("r", tuple(range(5)), Sampling(3))
    await accounts.start()
    try:
        with Caller(world.identity, accounts).entered():
            streams = [metered(SERVED, request, generate(life)) for life in lives]
            # All are asked for before the first ends.
            begun = await asyncio.gather(*(anext(s) for s in streams), return_exceptions=True)
            assert [isinstance(each, Exception) for each in begun] == [
                number in broken for number in range(3)
            ]
            for number in order:
                async for _ in streams[number]:
                    pass
    finally:
        await accounts.stop()
    num_answers = 3 - len(broken)
    assert world.settled() == ((1, 5, 3 * num_answers) if num_answers else (0, 0, 0))
    check_budget(world, is_killed=False)
    assert accounts.of(world.identity).num_reserved == 0


async def test_what_comes_past_the_doors_is_refused() -> None:
    request = EngineRequest("r", (1,), Sampling(max_tokens=8))
    with pytest.raises(AuthenticationError):
        await anext(metered(SERVED, request, generate(Life(1, (1,), "complete", 0, 0))))
    with pytest.raises(AuthenticationError):
        answered(GRAPH)


def test_a_batch_is_handed_in_again_under_the_same_keys() -> None:
    meter = UsageMeter("gateway/1")
    identity = Identity("key_1", "acme", frozenset())
    meter.add(identity, "inference", GRAPH, num_requests=1)
    meter.add(identity, "inference", GRAPH, num_requests=1)
    first = list(meter.batch())
    meter.add(identity, "inference", GRAPH, num_requests=5)
    assert list(meter.batch()) == first
    meter.delivered()
    (second,) = meter.batch()
    assert [entry.num_requests for entry in (*first, second)] == [2, 5]
    assert first[0].key != second.key
