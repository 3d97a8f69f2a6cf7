"""What those who are let in notice of an overload, and of slow clients beside them.

A real stack and one replica of a graph that takes some 50 ms, so that the model is what bounds it
and not the gateway or the client beside it. Its capacity is what 64 connections get; then requests
come at random moments, at 80 % of it and at 200 %, whatever became of those before. The other row
is two clients alone and beside 200 connections that read and write slowly.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path

import aiohttp
import numpy as np

from benchmarks.measure import Row, row_of
from tests.serving_load import INFER, NUM_SLOW, body_of, save_work, slow_clients
from tests.stack import Stack, new_stack

_PAIRS = 3
_NUM_CONNECTIONS = 64
_CAPACITY_S = 10.0
_LOAD_S = 20.0
_NUM_LAYERS = 2000


def measure() -> tuple[Row, ...]:
    directory = Path(tempfile.mkdtemp(prefix="hst"))
    stack = new_stack(directory)
    try:
        save_work(directory / "work.onnx", _NUM_LAYERS)
        for done in (
            stack.up(),
            stack.run_cli("models", "import", directory / "work.onnx", "--name", "work"),
            stack.run_cli("deploy", "work"),
        ):
            if done.returncode:
                raise RuntimeError(done.stderr)
        return asyncio.run(_measure(stack))
    finally:
        stack.run_cli("down")
        shutil.rmtree(directory, ignore_errors=True)


async def _measure(stack: Stack) -> tuple[Row, ...]:
    # One that costs little with hundreds of connections: what it takes, the model has not.
    async with aiohttp.ClientSession(
        stack.settings.gateway_url,
        headers={
            "authorization": f"Bearer {stack.key}",
            "content-type": "application/json",
        },
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=60),
    ) as client:
        load = _Load(client)
        return await _overload(load), await _beside_slow_clients(load, stack)


async def _overload(load: _Load) -> Row:
    capacity = await load.closed(_NUM_CONNECTIONS, _CAPACITY_S)
    pairs, refused = [], []
    for _ in range(_PAIRS):
        normal_s = await load.open(0.8 * capacity, _LOAD_S)
        refused.append(f"{load.share_refused:.1%}")
        overloaded_s = await load.open(2 * capacity, _LOAD_S)
        refused.append(f"{load.share_refused:.0%}")
        pairs.append((overloaded_s, normal_s))
    return row_of(
        "seconds, p99 of those let in at twice the capacity",
        pairs=pairs,
        peer_name="at 80 % of it",
        at_most=3,
        note=f"capacity {capacity:.0f} requests/s; refused, in turn: {', '.join(refused)}",
    )


async def _beside_slow_clients(load: _Load, stack: Stack) -> Row:
    pairs = []
    for _ in range(_PAIRS):
        alone_s = await load.closed_p99(2, _CAPACITY_S)
        with slow_clients(stack) as go_on:
            await asyncio.sleep(3)
            asking = asyncio.create_task(load.closed_p99(2, _CAPACITY_S))
            while not asking.done():
                go_on()
                await asyncio.sleep(0.5)
            pairs.append((await asking, alone_s))
    return row_of(
        f"seconds, p99 beside {NUM_SLOW} slow clients",
        pairs=pairs,
        peer_name="alone",
        at_most=2,
    )


class _Load:
    def __init__(self, client: aiohttp.ClientSession) -> None:
        self._client = client
        self._body = body_of(1)
        self._random = random.Random(1)
        self._forget()

    @property
    def share_refused(self) -> float:
        return self._statuses[503] / self._statuses.total()

    async def closed(self, num_clients: int, seconds: float) -> float:
        """Answers a second to clients that wait for theirs."""
        self._forget()
        deadline_s = time.perf_counter() + seconds

        async def ask_on() -> None:
            while time.perf_counter() < deadline_s:
                await self._ask()

        await asyncio.gather(*(ask_on() for _ in range(num_clients)))
        return self._statuses[200] / seconds

    async def closed_p99(self, num_clients: int, seconds: float) -> float:
        await self.closed(num_clients, seconds)
        return self._p99_s()

    async def open(self, rate: float, seconds: float) -> float:
        """Seconds within which 99 % of the answers came to requests that do not wait for others."""
        self._forget()
        asking: list[asyncio.Task[None]] = []
        next_s = time.perf_counter()
        end_s = next_s + seconds
        while next_s < end_s:
            await asyncio.sleep(max(0.0, next_s - time.perf_counter()))
            asking.append(asyncio.create_task(self._ask()))
            next_s += self._random.expovariate(rate)
        await asyncio.gather(*asking)
        return self._p99_s()

    def _forget(self) -> None:
        self._answers_s: list[float] = []
        self._statuses: Counter[int] = Counter()

    def _p99_s(self) -> float:
        return float(np.percentile(self._answers_s, 99))

    async def _ask(self) -> None:
        begun_s = time.perf_counter()
        async with self._client.post(INFER, data=self._body) as answer:
            text = await answer.text()
        self._statuses[answer.status] += 1
        if answer.status == 200:
            self._answers_s.append(time.perf_counter() - begun_s)
        elif answer.status != 503:
            raise RuntimeError(text)
