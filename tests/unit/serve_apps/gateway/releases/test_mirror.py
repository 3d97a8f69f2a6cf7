"""Mirrored work takes what the customers leave over, and is dropped before they notice it."""

from __future__ import annotations

import asyncio
import time
from contextvars import ContextVar

import pytest

from serve_apps.gateway.releases import mirror as module
from serve_apps.gateway.releases.mirror import Mirror

who: ContextVar[str] = ContextVar("who", default="nobody")


class Host:
    """A mirror whose customers are busy or not, and what became of its work."""

    def __init__(self) -> None:
        self.has_room = True
        self.done: list[str] = []
        self.num_dropped = 0
        self.mirror = Mirror(lambda: self.has_room, self._drop)

    def _drop(self) -> None:
        self.num_dropped += 1

    def offer(self, name: str, size_bytes: int = 1, seconds: float = 0.0) -> None:
        async def work() -> None:
            await asyncio.sleep(seconds)
            self.done.append(name)

        self.mirror.offer(work, size_bytes)

    async def until(self, num_done: int) -> None:
        async with asyncio.timeout(10):
            while len(self.done) < num_done:  # noqa: ASYNC110
                await asyncio.sleep(0.001)


async def test_it_waits_until_customers_leave_room() -> None:
    host = Host()
    host.has_room = False
    host.offer("a")
    host.offer("b")
    await asyncio.sleep(0.05)
    assert host.done == []
    host.has_room = True
    await host.until(2)
    assert (host.done, host.num_dropped) == (["a", "b"], 0)


async def test_what_would_be_too_much_or_waits_too_long_is_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_MAX_AGE_S", 0.05)
    host = Host()
    host.has_room = False
    for number in range(module._MAX_QUEUED + 5):
        host.offer(str(number))
    assert host.num_dropped == 5
    async with asyncio.timeout(10):
        while host.num_dropped < module._MAX_QUEUED + 5:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    host.offer("large", size_bytes=module._MAX_BYTES)
    host.offer("one byte too many")
    assert host.num_dropped == module._MAX_QUEUED + 6
    host.has_room = True
    await host.until(1)
    assert host.done == ["large"]


async def test_it_takes_no_more_than_a_quarter_of_the_time() -> None:
    host = Host()
    begun_s = time.monotonic()
    for number in range(3):
        host.offer(str(number), seconds=0.02)
    await host.until(3)
    # Two rests of three times as long lie between; a slow machine only makes it longer.
    assert time.monotonic() - begun_s >= 3 * 0.02 + 2 * 0.06


async def test_work_that_fails_does_not_end_it_and_knows_of_no_request() -> None:
    host, seen = Host(), []

    async def fail() -> None:
        seen.append(who.get())
        raise RuntimeError("boom")

    token = who.set("a customer")
    host.mirror.offer(fail, 1)
    host.offer("after it")
    who.reset(token)
    await host.until(1)
    assert (seen, host.done) == (["nobody"], ["after it"])


async def test_closing_ends_it() -> None:
    host = Host()
    host.offer("under way", seconds=5)
    host.offer("waiting")
    await asyncio.sleep(0.01)
    host.mirror.close()
    task = host.mirror._task
    assert task is not None
    await asyncio.wait({task}, timeout=5)
    assert (task.cancelled(), host.done) == (True, [])
