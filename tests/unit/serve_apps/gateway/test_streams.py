"""Streams that break, wait, or are read slowly."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import pytest

from cluster.errors import (
    HeliostatError,
    OverloadedError,
    ReplicaLeavingError,
    UpstreamFailedError,
    UpstreamTimeoutError,
)
from serve_apps.gateway import streams
from serve_apps.gateway.streams import Generate, StreamPlaces, read_ahead
from serve_apps.llm.engine import EngineRequest, Sampling, TokenLogprobs, TokenOutput
from serve_apps.llm.fake import FakeEngine
from serve_apps.llm.runner import EngineRunner
from serve_apps.options import DeploymentOptions

REQUEST = EngineRequest("r", (1, 2, 3), Sampling(max_tokens=6, temperature=0))


class Replicas:
    """Each gives a number of tokens more and then fails; None does not fail."""

    def __init__(self, *failures: int | None, error: type[HeliostatError] | None = None) -> None:
        self._failures = list(failures)
        self._error = error or UpstreamFailedError
        self.asked: list[EngineRequest] = []

    async def generate(self, request: EngineRequest) -> AsyncGenerator[TokenOutput, None]:
        fails_after = self._failures[len(self.asked)]
        self.asked.append(request)
        given = len(request.answer_ids)
        for number in range(given, request.sampling.max_tokens):
            if fails_after is not None and number == given + fails_after:
                raise self._error("the replica died")
            await asyncio.sleep(0)
            is_last = number == request.sampling.max_tokens - 1
            yield TokenOutput(request.request_id, (number,), "length" if is_last else None)


async def fill(given: list[int], outputs: AsyncGenerator[TokenOutput, None]) -> None:
    async for output in outputs:
        given.extend(output.token_ids)


def places(**options: float) -> StreamPlaces:
    return StreamPlaces(DeploymentOptions.model_validate(options))


@pytest.mark.parametrize(
    ("failures", "continued"),
    [
        ((0, None), ["failed"]),  # before its first token
        ((3, None), ["failed"]),
        ((5, None), ["failed"]),  # before its last
        ((1, 0, 0, None), ["failed"] * 3),
        ((1, 1, 1, 1, 1, None), ["failed"] * 5),
    ],
)
async def test_a_broken_stream_goes_on_from_the_tokens_already_given(
    failures: tuple[int | None, ...], continued: list[str]
) -> None:
    replicas, open_places, reasons = Replicas(*failures), places(), list[str]()
    outputs = read_ahead(replicas.generate, REQUEST, open_places, reasons.append)
    assert [token async for output in outputs for token in output.token_ids] == list(range(6))
    assert reasons == continued
    assert len({request.request_id for request in replicas.asked}) == len(failures)
    given = [len(request.answer_ids) for request in replicas.asked]
    # Each was told what had been given until then.
    assert given == [sum(n for n in failures[:i] if n) for i in range(len(failures))]
    await asyncio.sleep(0)
    assert open_places.num_open == 0


@pytest.mark.parametrize(
    ("failures", "num_tokens", "error"),
    [
        ((0, 0), 0, UpstreamFailedError),  # a new request is begun once more only
        ((1, 0, 0, 0), 1, UpstreamFailedError),
        ((1, 0, 0, 0), 1, OverloadedError),
        ((0,), 0, OverloadedError),  # refused at once, as there is no stream yet
    ],
)
async def test_it_is_given_up_where_no_replica_brings_a_token(
    failures: tuple[int, ...], num_tokens: int, error: type[HeliostatError]
) -> None:
    replicas, open_places, given = Replicas(*failures, error=error), places(), list[int]()
    with pytest.raises(error):
        await fill(given, read_ahead(replicas.generate, REQUEST, open_places))
    assert given == list(range(num_tokens))
    assert len(replicas.asked) == len(failures)
    assert open_places.num_open == 0


async def test_what_kills_replica_after_replica_is_given_up() -> None:
    replicas = Replicas(*[1] * (streams.MAX_FAILURES + 1))
    request = replace(REQUEST, sampling=replace(REQUEST.sampling, max_tokens=100))
    with pytest.raises(UpstreamFailedError):
        await fill([], read_ahead(replicas.generate, request, places()))
    assert len(replicas.asked) == streams.MAX_FAILURES + 1


@pytest.mark.parametrize("num_between", [1, 0])
async def test_replicas_that_leave_hand_over_as_often_as_they_like(num_between: int) -> None:
    num_moves = streams.MAX_FAILURES + 5
    moves = [1, *[num_between] * (num_moves - 1)]
    replicas = Replicas(*moves, None, error=ReplicaLeavingError)
    request = replace(REQUEST, sampling=replace(REQUEST.sampling, max_tokens=100))
    reasons: list[str] = []
    outputs = read_ahead(replicas.generate, request, places(), reasons.append)
    assert [token async for output in outputs for token in output.token_ids] == list(range(100))
    assert reasons == ["moved"] * num_moves


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": 0, "frequency_penalty": 1.5, "presence_penalty": 0.5},
        {"temperature": 1.3, "seed": 5},
        {"temperature": 0.8, "top_k": 9, "repetition_penalty": 1.4, "seed": 6},
        {"temperature": 0, "eos_token_ids": (3,)},
    ],
)
@pytest.mark.parametrize("num_given", [1, 7, 19])
async def test_a_continued_answer_is_the_unbroken_one(
    options: dict[str, Any], num_given: int
) -> None:
    sampling = Sampling(max_tokens=20, num_logprobs=2, **options)
    request = EngineRequest("r", (5, 1, 4, 1, 5, 9, 2, 6, 3), sampling)
    with contextlib.ExitStack() as opened:
        runners = [EngineRunner(FakeEngine(vocab_size=32)) for _ in range(3)]
        for runner in runners:
            opened.callback(runner.close)
        whole = await answer_of(runners[0].generate, request)
        num_asked = 0

        async def generate(asked: EngineRequest) -> AsyncGenerator[TokenOutput, None]:
            nonlocal num_asked
            num_asked += 1
            left = num_given if num_asked == 1 else 100
            async with contextlib.aclosing(runners[num_asked].generate(asked)) as outputs:
                async for output in outputs:
                    left -= len(output.token_ids)
                    if left < 0:
                        raise UpstreamFailedError("the replica died")
                    yield output

        assert await answer_of(generate, request) == whole
        assert num_asked == (2 if len(whole[0]) > num_given else 1)


async def answer_of(
    generate: Generate, request: EngineRequest
) -> tuple[list[int], list[TokenLogprobs], list[str]]:
    outputs = [output async for output in read_ahead(generate, request, places())]
    return (
        [token for output in outputs for token in output.token_ids],
        [entry for output in outputs for entry in output.logprobs],
        [output.finish_reason for output in outputs if output.finish_reason],
    )


async def test_the_seed_is_settled_before_the_first_replica_draws() -> None:
    replicas = Replicas(2, 2, None)
    request = replace(REQUEST, sampling=Sampling(max_tokens=6, temperature=1))
    await fill([], read_ahead(replicas.generate, request, places()))
    seeds = {asked.sampling.seed for asked in replicas.asked}
    assert len(seeds) == 1
    assert None not in seeds


async def test_no_replica_within_the_patience_ends_the_stream_with_an_error() -> None:
    async def generate(request: EngineRequest) -> AsyncGenerator[TokenOutput, None]:
        if request.answer_ids:
            await asyncio.sleep(60)  # as Serve waits for a first replica
        yield TokenOutput(request.request_id, (1,))
        raise UpstreamFailedError("the replica died")

    given: list[int] = []
    with pytest.raises(UpstreamTimeoutError, match="no token within"):
        await fill(given, read_ahead(generate, REQUEST, places(request_timeout_s=0.05)))
    assert given == [1]


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
        nothing: tuple[TokenOutput, ...] = ()
        for output in nothing:
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
