"""Streams that break, wait, or are read slowly."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator

import pytest

from cluster.errors import OverloadedError, UpstreamFailedError, UpstreamTimeoutError
from serve_apps.gateway.streams import StreamPlaces, read_ahead
from serve_apps.llm.engine import EngineRequest, Sampling, TokenOutput
from serve_apps.llm.fake import FakeEngine
from serve_apps.llm.runner import EngineRunner
from serve_apps.options import DeploymentOptions

REQUEST = EngineRequest("r", (1, 2, 3), Sampling(max_tokens=6, temperature=0))


class Replicas:
    """Each is given the number of tokens after which it fails; one that does not is given None."""

    def __init__(self, *failures: int | None) -> None:
        self._failures = list(failures)
        self.asked: list[str] = []

    async def generate(self, request: EngineRequest) -> AsyncGenerator[TokenOutput, None]:
        fails_after = self._failures[len(self.asked)]
        self.asked.append(request.request_id)
        for number in range(request.sampling.max_tokens):
            if number == fails_after:
                raise UpstreamFailedError("the replica died")
            await asyncio.sleep(0)
            is_last = number == request.sampling.max_tokens - 1
            yield TokenOutput(request.request_id, (number,), "length" if is_last else None)


async def tokens_of(replicas: Replicas, places: StreamPlaces) -> list[int]:
    outputs = read_ahead(replicas.generate, REQUEST, places)
    return [token async for output in outputs for token in output.token_ids]


def places(**options: float) -> StreamPlaces:
    return StreamPlaces(DeploymentOptions.model_validate(options))


async def test_a_stream_that_fails_before_its_first_token_is_begun_once_more() -> None:
    replicas, open_places = Replicas(0, None), places()
    assert await tokens_of(replicas, open_places) == list(range(6))
    assert len(set(replicas.asked)) == 2
    await asyncio.sleep(0)
    assert open_places.num_open == 0


@pytest.mark.parametrize(("failures", "num_asked"), [((0, 0, None), 2), ((1, None), 1)])
async def test_it_is_never_begun_twice_more_nor_after_a_token(
    failures: tuple[int | None, ...], num_asked: int
) -> None:
    replicas, open_places = Replicas(*failures), places()
    with pytest.raises(UpstreamFailedError):
        await tokens_of(replicas, open_places)
    assert len(replicas.asked) == num_asked
    assert open_places.num_open == 0


async def test_a_slow_reader_holds_no_place_once_all_is_generated() -> None:
    replicas, open_places = Replicas(None), places()
    outputs = read_ahead(replicas.generate, REQUEST, open_places)
    assert (await anext(outputs)).token_ids == (0,)
    assert open_places.num_open == 1
    for _ in range(20):
        await asyncio.sleep(0)
    assert open_places.num_open == 0
    assert [token async for output in outputs for token in output.token_ids] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("num_read", [0, 1])
async def test_a_reader_who_leaves_frees_the_engine(num_read: int) -> None:
    engine = FakeEngine(step_time_s=0.01)
    runner, open_places = EngineRunner(engine), places()
    request = EngineRequest("r", (1, 2, 3), Sampling(max_tokens=4000, temperature=0))
    outputs = read_ahead(runner.generate, request, open_places)
    reading = asyncio.ensure_future(anext(outputs))
    await asyncio.sleep(0.005)
    if num_read:
        await reading
    assert engine.stats().num_running == 1
    reading.cancel()
    await asyncio.wait([reading])
    await outputs.aclose()
    assert (engine.stats().num_running, open_places.num_open) == (0, 0)
    runner.close()


async def test_a_silent_replica_times_out_and_is_not_asked_again() -> None:
    asked = 0

    async def silent(request: EngineRequest) -> AsyncGenerator[TokenOutput, None]:
        nonlocal asked
        asked += 1
        await asyncio.sleep(60)
        yield TokenOutput(request.request_id, (1,))

    with pytest.raises(UpstreamTimeoutError, match=r"no token within 0\.02 s"):
        await anext(read_ahead(silent, REQUEST, places(request_timeout_s=0.02)))
    assert asked == 1


async def test_a_stream_that_ends_without_a_reason_is_a_failure() -> None:
    async def empty(_request: EngineRequest) -> AsyncGenerator[TokenOutput, None]:
        for output in ():
            yield output

    with pytest.raises(UpstreamFailedError, match="ended early"):
        await anext(read_ahead(empty, REQUEST, places()))


async def test_no_more_may_wait_than_places_are_free_soon() -> None:
    open_places = places(max_running=2, max_queued_requests=100, max_queue_wait_s=0)
    with open_places.take():
        await asyncio.sleep(0.05)
    # A stream takes 0.05 s, of two at once; beyond a burst those wait who can begin soon.
    with contextlib.ExitStack() as taken:
        for _ in range(3):
            taken.enter_context(open_places.take())
        with pytest.raises(OverloadedError, match="would wait"):
            _take_all(open_places, taken)
        assert 3 <= open_places.num_open < 40


def _take_all(open_places: StreamPlaces, taken: contextlib.ExitStack) -> None:
    for _ in range(60):
        taken.enter_context(open_places.take())


async def test_places_are_bounded_by_number_too() -> None:
    open_places = places(max_running=1, max_queued_requests=0)
    with open_places.take(), pytest.raises(OverloadedError, match="full, with 0 waiting"):
        open_places.take().__enter__()
    with open_places.take():
        assert open_places.num_open == 1
