"""Adapters that a replica holds beside its model: loaded when asked for, a bounded number of them.

Knows nothing of packages and engines: what loads one, and what forgets it, is given to it. All
within one event loop.

    shelf = AdapterShelf(load, unload, max_adapters=8)
    async with shelf.hold("sha256:…"):
        ...                                     # it stays loaded
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from cluster.errors import OverloadedError


class AdapterShelf:
    """Adapters by digest; where there is no room, the one that was asked for longest ago goes."""

    def __init__(
        self,
        load: Callable[[str], Awaitable[None]],
        unload: Callable[[str], Awaitable[None]],
        *,
        max_adapters: int,
    ) -> None:
        self._load = load
        self._unload = unload
        self._max_adapters = max_adapters
        self._loading: OrderedDict[str, asyncio.Task[None]] = OrderedDict()
        """Loaded or being loaded; the one asked for last is the last."""
        self._unloading: set[asyncio.Future[None]] = set()
        self._num_holders: Counter[str] = Counter()

    @asynccontextmanager
    async def hold(self, digest: str) -> AsyncIterator[None]:
        """Have an adapter loaded for as long as the block runs.

        Raises:
            OverloadedError: as many others as there is room for are in use.
            HeliostatError: it cannot be loaded; the next one who asks tries anew.
        """
        self._num_holders[digest] += 1
        try:
            await self._loaded(digest)
            yield
        finally:
            self._num_holders[digest] -= 1
            if not self._num_holders[digest]:
                del self._num_holders[digest]

    async def _loaded(self, digest: str) -> None:
        task = self._loading.get(digest)
        if task is None:
            self._make_room()
            task = self._loading[digest] = asyncio.create_task(self._load_into_room(digest))
            task.add_done_callback(lambda task: self._note(digest, task))
        self._loading.move_to_end(digest)
        # Shielded, so that one client leaving does not cancel the others' loading.
        await asyncio.shield(task)

    async def _load_into_room(self, digest: str) -> None:
        if self._unloading:  # among them may be this very one
            await asyncio.wait(self._unloading)
        await self._load(digest)

    def _note(self, digest: str, task: asyncio.Task[None]) -> None:
        """Forget one that failed, also where all who asked for it have left."""
        has_failed = task.cancelled() or task.exception() is not None
        if has_failed and self._loading.get(digest) is task:
            self._let_go(digest)

    def _let_go(self, digest: str) -> None:
        del self._loading[digest]
        going = asyncio.ensure_future(self._unload(digest))
        self._unloading.add(going)
        going.add_done_callback(self._unloading.discard)

    def _make_room(self) -> None:
        while len(self._loading) >= self._max_adapters:
            idle = [
                digest
                for digest, task in self._loading.items()
                if not self._num_holders[digest] and task.done()
            ]
            if not idle:
                raise OverloadedError(
                    f"this replica holds {self._max_adapters} adapters at most, all in use",
                    hint="try again later, or raise max_adapters in the base's options",
                )
            self._let_go(idle[0])
