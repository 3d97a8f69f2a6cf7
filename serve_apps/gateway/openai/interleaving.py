"""Several streams as one: items as they come, each with the number of its stream.

Knows asyncio alone.

    async for number, item in interleave([first, second]):
        print(number, "ended" if item is None else item)
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import TypeVar

ItemType = TypeVar("ItemType")


async def interleave(
    streams: Sequence[AsyncGenerator[ItemType, None]],
) -> AsyncGenerator[tuple[int, ItemType | None], None]:
    """Items with the number of their stream, and None at the end of each.

    A stream is asked for its next item only once the last one was taken. The first error ends all;
    closing this generator closes them.
    """
    try:
        if len(streams) == 1:
            async for item in streams[0]:
                yield 0, item
            yield 0, None
            return
        async for pair in _from_all(streams):
            yield pair
    finally:
        for stream in streams:
            await stream.aclose()


async def _from_all(
    streams: Sequence[AsyncGenerator[ItemType, None]],
) -> AsyncGenerator[tuple[int, ItemType | None], None]:
    asking = {asyncio.ensure_future(anext(s, None)): number for number, s in enumerate(streams)}
    try:
        while asking:
            done, _ = await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=lambda task: asking[task]):
                item, number = task.result(), asking.pop(task)
                if item is not None:
                    asking[asyncio.ensure_future(anext(streams[number], None))] = number
                yield number, item
    finally:
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
