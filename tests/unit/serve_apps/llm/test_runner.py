"""Each caller gets its own tokens, leaving frees the engine, a broken engine fails everyone."""

from __future__ import annotations

import asyncio

import pytest

from cluster.errors import InputError, OverloadedError, UpstreamFailedError
from serve_apps.llm.engine import EngineRequest, Sampling
from serve_apps.llm.fake import FakeEngine
from serve_apps.llm.runner import EngineRunner


def ask(request_id: str, prompt: tuple[int, ...], max_tokens: int = 6) -> EngineRequest:
    return EngineRequest(request_id, prompt, Sampling(max_tokens=max_tokens, temperature=0))


async def collect(runner: EngineRunner, request: EngineRequest) -> list[int]:
    return [i async for output in runner.generate(request) for i in output.token_ids]


async def running(engine: FakeEngine, count: int) -> None:
    while engine.stats().num_running < count:  # noqa: ASYNC110 - an engine has no event to await
        await asyncio.sleep(0.001)


async def test_callers_get_their_own_tokens() -> None:
    runner = EngineRunner(FakeEngine())
    answers = await asyncio.gather(*(collect(runner, ask(str(i), (i,))) for i in range(40)))
    assert answers == [[i] * 6 for i in range(40)]
    runner.close()


async def test_leaving_early_frees_the_place() -> None:
    engine = FakeEngine()
    runner = EngineRunner(engine)
    stream = runner.generate(ask("a", (1,), max_tokens=4000))
    await anext(stream)
    assert engine.stats().num_running == 1
    await stream.aclose()
    assert engine.stats().num_running == 0
    runner.close()


async def test_cancelling_the_reader_frees_the_place() -> None:
    engine = FakeEngine(max_context_tokens=10**9, step_time_s=1e-4)
    runner = EngineRunner(engine)
    task = asyncio.create_task(collect(runner, ask("a", (1,), max_tokens=10**8)))
    await running(engine, 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert engine.stats().num_running == 0
    runner.close()


async def test_a_broken_engine_fails_every_caller_and_every_later_one() -> None:
    engine = FakeEngine(max_context_tokens=10**9, step_time_s=1e-4)
    runner = EngineRunner(engine)
    tasks = [
        asyncio.create_task(collect(runner, ask(str(i), (i,), max_tokens=10**8))) for i in range(3)
    ]
    await running(engine, 3)
    engine.fail("the device fell off")
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(result, UpstreamFailedError)
        assert "the device fell off" in str(result)
    with pytest.raises(UpstreamFailedError):
        await collect(runner, ask("late", (1,)))
    assert runner.failure is not None


async def test_closing_ends_streams_instead_of_hanging_them() -> None:
    runner = EngineRunner(FakeEngine(max_context_tokens=10**9, step_time_s=1e-4))
    stream = runner.generate(ask("a", (1,), max_tokens=10**8))
    await anext(stream)
    runner.close()
    with pytest.raises(UpstreamFailedError):
        async for _ in stream:
            pass


async def test_refused_requests_leave_nothing_behind() -> None:
    engine = FakeEngine()
    runner = EngineRunner(engine)
    with pytest.raises(InputError):
        await collect(runner, ask("a", ()))
    assert await collect(runner, ask("a", (1,), max_tokens=1)) == [1]
    runner.close()


async def test_too_many_requests_are_turned_away_at_once() -> None:
    runner = EngineRunner(FakeEngine(max_context_tokens=10**9, step_time_s=1e-4), max_requests=1)
    stream = runner.generate(ask("a", (1,), max_tokens=10**8))
    await anext(stream)
    with pytest.raises(OverloadedError, match="1 requests"):
        await collect(runner, ask("b", (1,)))
    await stream.aclose()
    runner.close()
