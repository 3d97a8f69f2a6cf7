"""Answers are whole and in order, whether they come on their own streams or in channels."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator

import pytest

from cluster.errors import InputError, UpstreamFailedError
from serve_apps.gateway import channels as gateway_channels
from serve_apps.gateway import serve_backend
from serve_apps.gateway.channels import Inbox
from serve_apps.gateway.serve_backend import ServeBackend
from serve_apps.llm import channels as replica_channels
from serve_apps.llm.channels import MIN_ANSWERS, Channel, OutputChannels, Part
from serve_apps.llm.engine import EngineRequest, Sampling, TokenOutput
from serve_apps.llm.placements import Placements

APPLICATION = "talker.v1"


def part(start: int, *tokens: int, is_last: bool = False) -> Part:
    return start, TokenOutput("r", tokens, "length" if is_last else None)


async def tokens_in(inbox: Inbox) -> list[int]:
    return [token async for output in inbox.outputs() for token in output.token_ids]


async def test_parts_are_put_in_order() -> None:
    inbox = Inbox()
    for each in (part(4, 14, is_last=True), part(1, 11, 12), part(3, 13), part(0, 10)):
        inbox.put(each)
    assert await tokens_in(inbox) == [10, 11, 12, 13, 14]


async def test_the_last_part_waits_for_what_is_still_on_its_way() -> None:
    inbox, found = Inbox(), list[int]()

    async def read() -> None:
        async for output in inbox.outputs():
            found.extend(output.token_ids)

    reading = asyncio.create_task(read())
    inbox.put(part(0, 10))
    inbox.put(part(2, 12, is_last=True))
    inbox.end()
    await asyncio.sleep(0.01)
    assert found == [10]
    inbox.put(part(1, 11))
    await reading
    assert found == [10, 11, 12]


async def test_a_part_that_never_comes_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_channels, "_GRACE_S", 0.01)
    inbox = Inbox()
    inbox.put(part(0, 10))
    inbox.put(part(2, 12, is_last=True))
    inbox.end()
    outputs = inbox.outputs()
    assert (await anext(outputs)).token_ids == (10,)
    with pytest.raises(UpstreamFailedError, match="was lost"):
        await anext(outputs)


async def test_an_answer_that_ends_early_or_with_an_error_says_so_after_what_came() -> None:
    early, failed = Inbox(), Inbox()
    for inbox in (early, failed):
        inbox.put(part(0, 10))
    early.end()
    failed.end(InputError("impossible"))
    assert await tokens_in(early) == [10]
    outputs = failed.outputs()
    assert (await anext(outputs)).token_ids == (10,)
    with pytest.raises(InputError, match="impossible"):
        await anext(outputs)


class Replica:
    """Replica `a` as handles reach it: one step gives each answer a token."""

    def __init__(self, placements: Placements) -> None:
        self._placements = placements
        self._channels = OutputChannels()
        self._next_step = asyncio.Event()
        self.num_steps = 0
        self.messages: Counter[str] = Counter()
        self.num_listening = 0
        self.listening_fails_after = 10**9

    async def step(self) -> None:
        self.num_steps += 1
        step, self._next_step = self._next_step, asyncio.Event()
        step.set()
        for _ in range(20):
            await asyncio.sleep(0)

    async def stream(
        self, application: str, method: str, asked: EngineRequest | Channel, *arguments: object
    ) -> AsyncGenerator[object, None]:
        assert application == APPLICATION
        parts = (
            self._generate(asked, *arguments)  # type: ignore[arg-type]
            if isinstance(asked, EngineRequest)
            else self._listen(asked)
        )
        async for each in parts:
            self.messages[method] += 1
            yield each

    async def _generate(self, request: EngineRequest, reader: str) -> AsyncGenerator[Part, None]:
        self._placements.placed(request.request_id, APPLICATION, "a")
        with self._channels.answering(reader):
            for number in range(request.sampling.max_tokens):
                await self._next_step.wait()
                is_last = number == request.sampling.max_tokens - 1
                output = TokenOutput(request.request_id, (number,), "length" if is_last else None)
                if not self._channels.tell(reader, (number, output)):
                    yield number, output

    async def _listen(self, asked: Channel) -> AsyncGenerator[list[Part], None]:
        assert asked.replica == "a"
        self._placements.placed(asked.request_id, APPLICATION, "a")
        self.num_listening += 1
        num_messages = 0
        try:
            async for parts in self._channels.listen(asked):
                if num_messages == self.listening_fails_after:
                    raise UpstreamFailedError("the channel broke")
                num_messages += 1
                yield parts
        finally:
            self.num_listening -= 1


@pytest.fixture
def replica(monkeypatch: pytest.MonkeyPatch) -> Replica:
    placements = Placements()
    monkeypatch.setattr(serve_backend, "PLACEMENTS", placements)
    monkeypatch.setattr(gateway_channels, "PLACEMENTS", placements)
    monkeypatch.setattr(replica_channels, "_IDLE_S", 0.05)
    return Replica(placements)


@pytest.fixture
def backend(replica: Replica) -> ServeBackend:
    backend = ServeBackend()
    backend._handles = replica  # type: ignore[assignment]
    return backend


def ask(backend: ServeBackend, name: str, num_tokens: int) -> asyncio.Task[list[int]]:
    request = EngineRequest(name, (1,), Sampling(max_tokens=num_tokens))

    async def read() -> list[int]:
        outputs = backend.generate(APPLICATION, request, drain_s=60)
        return [token async for output in outputs for token in output.token_ids]

    return asyncio.create_task(read())


async def run(replica: Replica, *answers: asyncio.Task[list[int]]) -> None:
    for _ in range(1000):
        if all(answer.done() for answer in answers):
            return
        await replica.step()
    raise AssertionError("answers do not end")


async def test_several_answers_share_the_messages_of_each_step(
    backend: ServeBackend, replica: Replica
) -> None:
    answers = [ask(backend, f"r{n}", 50) for n in range(8)]
    await replica.step()
    late = ask(backend, "late", 50)
    await run(replica, *answers, late)
    for answer in (*answers, late):
        assert answer.result() == list(range(50))
    assert replica.messages["listen"] <= replica.num_steps
    assert replica.messages["generate"] <= 9 * 5, "beginnings and ends"
    await asyncio.sleep(0.2)
    assert replica.num_listening == 0
    assert not backend._channels._replicas


async def test_a_channel_ends_with_most_of_its_answers(
    backend: ServeBackend, replica: Replica
) -> None:
    """Serve counts it as a call: one that stayed for the last would keep replicas up."""
    short = [ask(backend, f"s{n}", 10) for n in range(MIN_ANSWERS)]
    long = [ask(backend, f"l{n}", 60) for n in range(MIN_ANSWERS - 1)]
    await replica.step()
    await replica.step()
    assert replica.num_listening == 1
    await run(replica, *short)
    await replica.step()
    assert replica.num_listening == 0
    await run(replica, *long)
    assert [answer.result() for answer in long] == [list(range(60))] * len(long)


async def test_few_answers_need_no_channel(backend: ServeBackend, replica: Replica) -> None:
    answers = [ask(backend, f"r{n}", 20) for n in range(MIN_ANSWERS - 1)]
    await run(replica, *answers)
    assert replica.messages["listen"] == 0
    assert [answer.result() for answer in answers] == [list(range(20))] * len(answers)


async def test_a_channel_that_breaks_fails_its_answers_alone(
    backend: ServeBackend, replica: Replica
) -> None:
    replica.listening_fails_after = 3
    answers = [ask(backend, f"r{n}", 50) for n in range(MIN_ANSWERS)]
    await run(replica, *answers)
    for answer in answers:
        assert isinstance(answer.exception(), UpstreamFailedError)
    replica.listening_fails_after = 10**9
    again = [ask(backend, f"s{n}", 20) for n in range(MIN_ANSWERS)]
    await run(replica, *again)
    assert [answer.result() for answer in again] == [list(range(20))] * MIN_ANSWERS


async def test_a_channel_that_cannot_be_opened_costs_nothing(
    backend: ServeBackend, replica: Replica
) -> None:
    replica.listening_fails_after = 0
    answers = [ask(backend, f"r{n}", 3) for n in range(MIN_ANSWERS)]

    async def refuse(asked: Channel) -> AsyncGenerator[list[Part], None]:
        if asked.replica:
            raise UpstreamFailedError("no room")
        yield []

    replica._listen = refuse  # type: ignore[method-assign]
    await run(replica, *answers)
    assert [answer.result() for answer in answers] == [[0, 1, 2]] * MIN_ANSWERS


async def test_who_leaves_takes_no_other_answer_along(
    backend: ServeBackend, replica: Replica
) -> None:
    answers = [ask(backend, f"r{n}", 30) for n in range(MIN_ANSWERS + 2)]
    for _ in range(6):
        await replica.step()
    for leaving in answers[:3]:
        leaving.cancel()
    await run(replica, *answers)
    assert [answer.cancelled() for answer in answers] == [True] * 3 + [False] * 3
    assert [answer.result() for answer in answers[3:]] == [list(range(30))] * 3
