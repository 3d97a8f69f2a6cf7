"""What was put in and not taken yet: who reads slowly gets more at a time.

mailbox = Mailbox[TokenOutput]()
mailbox.put(output)
outputs = await mailbox.take()
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Generic, TypeVar

ItemType = TypeVar("ItemType")


class Mailbox(Generic[ItemType]):
    """For one reader, in one event loop."""

    def __init__(self) -> None:
        self.items: list[ItemType] = []
        self._arrived = asyncio.Event()

    def put(self, item: ItemType) -> None:
        self.items.append(item)
        self._arrived.set()

    async def take(self, patience_s: float | None = None) -> list[ItemType]:
        """Everything there is, at least one item; nothing where none comes in time."""
        if not self.items:
            self._arrived.clear()
            # Something may come at the very moment that the time is over.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience_s):
                    await self._arrived.wait()
        items, self.items = self.items, []
        return items
