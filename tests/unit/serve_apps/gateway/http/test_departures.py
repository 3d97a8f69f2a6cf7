import asyncio
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from serve_apps.gateway.http.departures import Departures

SCOPE: Scope = {"type": "http"}


class Client:
    """Sends a body in parts, and leaves when told to."""

    def __init__(self, *parts: bytes) -> None:
        self.sent: asyncio.Queue[Message] = asyncio.Queue()
        for number, part in enumerate(parts, 1):
            self.send(part, more=number < len(parts))

    def send(self, part: bytes, *, more: bool) -> None:
        self.sent.put_nowait({"type": "http.request", "body": part, "more_body": more})

    def leave(self) -> None:
        self.sent.put_nowait({"type": "http.disconnect"})

    async def receive(self) -> Message:
        return await self.sent.get()


class Work:
    """Reads the body and then works until it is let go or ended."""

    def __init__(self) -> None:
        self.has_begun, self.may_end = asyncio.Event(), asyncio.Event()
        self.body, self.outcome = b"", "none"

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        try:
            more = True
            while more:
                message = await receive()
                self.body += message["body"]
                more = message["more_body"]
            self.has_begun.set()
            await self.may_end.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body"})
            await self.answer_sent()
            self.outcome = "done"
        except asyncio.CancelledError:
            self.outcome = "ended"
            raise

    async def answer_sent(self) -> None:
        """What is left to do then."""


async def send(_message: Message) -> None:
    pass


def run(work: Any, client: Client) -> asyncio.Task[None]:
    return asyncio.create_task(Departures(work)(SCOPE, client.receive, send))


async def test_work_ends_when_its_client_leaves_and_the_server_sees_no_error() -> None:
    work, client = Work(), Client(b"a", b"b")
    running = run(work, client)
    await work.has_begun.wait()
    client.leave()
    await asyncio.wait_for(running, 5)
    assert (work.body, work.outcome) == (b"ab", "ended")


async def test_parts_of_a_body_that_comes_slowly_reach_who_reads_it() -> None:
    work, client = Work(), Client()
    running = run(work, client)
    for _ in range(3):
        await asyncio.sleep(0.15)
        client.send(b"x", more=True)
    client.send(b"y", more=False)
    await work.has_begun.wait()
    work.may_end.set()
    await asyncio.wait_for(running, 5)
    assert (work.body, work.outcome) == (b"xxxy", "done")


async def test_the_servers_own_end_is_not_taken_for_the_clients() -> None:
    work, client = Work(), Client(b"")
    running = run(work, client)
    await work.has_begun.wait()
    await asyncio.sleep(0.3)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert work.outcome == "ended"


async def test_who_leaves_in_the_middle_of_a_body_is_no_error_either() -> None:
    work, client = Work(), Client()
    running = run(work, client)
    client.send(b"a", more=True)
    client.leave()
    await asyncio.wait_for(running, 5)
    assert (work.body, work.outcome) == (b"a", "ended")


async def test_what_is_done_after_the_answer_goes_on_when_the_client_leaves() -> None:
    client = Client(b"")

    class Tidying(Work):
        async def answer_sent(self) -> None:
            client.leave()
            await asyncio.sleep(0.3)

    work = Tidying()
    running = run(work, client)
    await asyncio.sleep(0.4)  # it is being listened for
    work.may_end.set()
    await asyncio.wait_for(running, 5)
    assert work.outcome == "done"
