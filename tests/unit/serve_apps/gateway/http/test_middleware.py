"""Bodies that come slowly."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from serve_apps.gateway.http.middleware import BodyLimit, RequestContext

PART = {"type": "http.request", "body": b"x", "more_body": True}
LAST = {"type": "http.request", "body": b"x", "more_body": False}


async def send_slowly(*parts: tuple[float, Message]) -> tuple[int, float]:
    """Status and seconds of a request whose body's parts come after so many seconds each."""
    waiting: Iterator[tuple[float, Message]] = iter(parts)
    sent: list[Any] = []

    async def receive() -> Message:
        delay_s, message = next(waiting)
        await asyncio.sleep(delay_s)
        return message

    async def send(message: Message) -> None:
        sent.append(message)

    async def read_all(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body"):
            pass
        # The answer may take longer than the body.
        assert (await receive())["type"] == "http.disconnect"
        await send({"type": "http.response.start", "status": 200, "headers": []})

    app = RequestContext(BodyLimit(read_all, max_bytes=100, max_s=0.1))
    scope = {"type": "http", "path": "/v2/models/m/infer", "headers": []}
    begun_s = asyncio.get_running_loop().time()
    await app(scope, receive, send)
    return sent[0]["status"], asyncio.get_running_loop().time() - begun_s


@pytest.mark.parametrize("num_parts", [0, 1, 9])
async def test_a_body_that_trickles_is_given_up(num_parts: int) -> None:
    status, seconds = await send_slowly(*[(0.012, PART)] * num_parts, (60, LAST))
    assert status == 408
    assert seconds < 5


async def test_only_the_body_is_timed() -> None:
    left = (0.15, {"type": "http.disconnect"})
    assert (await send_slowly((0.01, PART), (0.01, LAST), left))[0] == 200
