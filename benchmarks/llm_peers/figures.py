"""What one run of a language model measured, and how a closed loop of streams measures it.

figures = await closed_loop(8, 16, stream)
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Figures:
    """Of one run."""

    tokens_per_s: float
    """Generated tokens, over the whole run."""
    ttft_p50_s: float
    decode_tokens_per_s: float
    """Of one stream, from its first token on; the median."""


@dataclass(frozen=True)
class StreamTimes:
    """Of one answer, in seconds of any clock."""

    began_s: float
    first_s: float
    ended_s: float
    num_tokens: int


async def closed_loop(
    num_streams: int, num_answers: int, stream: Callable[[int], Awaitable[StreamTimes]]
) -> Figures:
    """Keep so many streams open until so many answers were read; `stream` gets their number."""
    numbers = iter(range(num_answers))
    found: list[StreamTimes] = []

    async def read_on() -> None:
        for number in numbers:
            found.append(await stream(number))

    began_s = time.perf_counter()
    await asyncio.gather(*(read_on() for _ in range(num_streams)))
    return figures_of(found, time.perf_counter() - began_s)


def figures_of(found: list[StreamTimes], seconds: float) -> Figures:
    return Figures(
        tokens_per_s=sum(times.num_tokens for times in found) / seconds,
        ttft_p50_s=statistics.median(times.first_s - times.began_s for times in found),
        decode_tokens_per_s=statistics.median(
            (times.num_tokens - 1) / max(1e-9, times.ended_s - times.first_s) for times in found
        ),
    )
