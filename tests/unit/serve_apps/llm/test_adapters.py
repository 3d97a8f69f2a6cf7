"""The shelf: loaded once for all who ask, kept while in use, bounded."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from cluster.errors import OverloadedError, PackageError
from serve_apps.llm.adapters import AdapterShelf


class Loads:
    """What was loaded and unloaded, in order."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.gate, self.exit = asyncio.Event(), asyncio.Event()
        self.gate.set()
        self.exit.set()
        self.error: Exception | None = None

    async def load(self, digest: str) -> None:
        self.log.append(f"+{digest}")
        await self.gate.wait()
        if self.error is not None:
            raise self.error

    async def unload(self, digest: str) -> None:
        await self.exit.wait()
        self.log.append(f"-{digest}")

    def shelf(self, max_adapters: int) -> AdapterShelf:
        return AdapterShelf(self.load, self.unload, max_adapters=max_adapters)


async def ask(shelf: AdapterShelf, *digests: str) -> None:
    for digest in digests:
        async with shelf.hold(digest):
            pass


async def test_the_one_asked_for_longest_ago_makes_room() -> None:
    loads = Loads()
    await ask(loads.shelf(2), "a", "b", "a", "c", "a", "b")
    assert loads.log == ["+a", "+b", "-b", "+c", "-c", "+b"]


async def test_one_that_takes_its_time_to_go_keeps_nobody_but_those_who_come_in_its_place() -> None:
    loads = Loads()
    shelf = loads.shelf(2)
    await ask(shelf, "a", "b")
    loads.exit.clear()
    coming = asyncio.create_task(ask(shelf, "c"))
    await asyncio.sleep(0)
    await ask(shelf, "b")  # which is there
    again = asyncio.create_task(ask(shelf, "a"))  # which is on its way out
    await asyncio.sleep(0.01)
    assert loads.log == ["+a", "+b"]
    loads.exit.set()
    await asyncio.gather(coming, again)
    assert (sorted(loads.log[2:4]), sorted(loads.log[4:])) == (["-a", "-b"], ["+a", "+c"])


async def test_one_in_use_stays_and_one_too_many_is_refused() -> None:
    loads = Loads()
    shelf = loads.shelf(2)
    async with shelf.hold("a"), shelf.hold("a"), shelf.hold("b"):
        with pytest.raises(OverloadedError, match="2 adapters at most"):
            await ask(shelf, "c")
    await ask(shelf, "c")
    assert loads.log == ["+a", "+b", "-a", "+c"]


async def test_many_who_ask_at_once_load_it_once_and_one_who_leaves_disturbs_nobody() -> None:
    loads = Loads()
    loads.gate.clear()
    shelf = loads.shelf(1)
    asking = [asyncio.create_task(ask(shelf, "a")) for _ in range(3)]
    await asyncio.sleep(0)
    asking[0].cancel()
    await asyncio.sleep(0)
    with pytest.raises(OverloadedError):  # it is still on its way
        await ask(shelf, "b")
    loads.gate.set()
    await asyncio.gather(*asking[1:])
    with contextlib.suppress(asyncio.CancelledError):
        await asking[0]
    assert loads.log == ["+a"]


async def test_a_failure_that_nobody_waits_for_any_more_is_tried_anew() -> None:
    loads = Loads()
    loads.gate.clear()
    loads.error = PackageError("changed")
    shelf = loads.shelf(1)
    asking = asyncio.create_task(ask(shelf, "a"))
    await asyncio.sleep(0)
    asking.cancel()
    await asyncio.wait({asking})
    loads.gate.set()
    await asyncio.sleep(0.01)
    loads.error = None
    await ask(shelf, "a")
    assert loads.log == ["+a", "-a", "+a"]


async def test_a_failure_is_everybodys_and_is_tried_anew() -> None:
    loads = Loads()
    loads.error = PackageError("changed")
    shelf = loads.shelf(1)
    results = await asyncio.gather(ask(shelf, "a"), ask(shelf, "a"), return_exceptions=True)
    assert [type(result) for result in results] == [PackageError, PackageError]
    loads.error = None
    await ask(shelf, "a")
    assert loads.log == ["+a", "-a", "+a"]
