"""Group commit: each caller gets its own answer; no timer, no harm from a neighbour."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import (
    InputError,
    OverloadedError,
    UpstreamFailedError,
    UpstreamTimeoutError,
)
from serve_apps.gateway.batcher import Arrays, Batcher, BatchLimits
from serve_apps.gateway.models import can_join
from tests.unit.serve_apps.conftest import graph_manifest

POISON = -1.0


class Model:
    """Doubles its input; calls wait until they are let go."""

    def __init__(self, *, held: bool = False) -> None:
        self.sizes: list[int] = []
        self.order: list[float] = []
        self.most_at_once = 0
        self._at_once = 0
        self._gate = asyncio.Event()
        if not held:
            self._gate.set()

    def let_go(self) -> None:
        self._gate.set()

    async def __call__(self, arrays: Arrays) -> Arrays:
        x = arrays["x"]
        self.sizes.append(len(x))
        self.order.extend(x[:, 0].tolist())
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            await self._gate.wait()
        finally:
            self._at_once -= 1
        if (x == POISON).any():
            raise InputError("poison")
        return {"y": x * 2}


def rows(*values: float, width: int = 2) -> Arrays:
    return {"x": np.array([[value] * width for value in values], dtype=np.float32)}


async def queue_up(batcher: Batcher, *requests: Arrays) -> list[asyncio.Task[Arrays]]:
    tasks = [asyncio.create_task(batcher.submit(request)) for request in requests]
    await asyncio.sleep(0)
    return tasks


async def test_a_lone_request_goes_at_once_and_what_queues_meanwhile_goes_together() -> None:
    model = Model(held=True)
    batcher = Batcher(model)
    tasks = await queue_up(batcher, *(rows(i) for i in range(10)))
    assert model.sizes == []
    await asyncio.sleep(0)
    assert model.sizes == [1]
    model.let_go()
    answers = await asyncio.gather(*tasks)
    assert model.sizes == [1, 9]
    assert [answer["y"][0, 0] for answer in answers] == [2 * i for i in range(10)]


@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=25),
    max_batch_size=st.integers(1, 8),
    max_in_flight=st.integers(1, 3),
)
@settings(max_examples=60, deadline=None)
def test_everyone_gets_their_own_answer_in_order_and_within_bounds(
    sizes: list[int], max_batch_size: int, max_in_flight: int
) -> None:
    async def scenario() -> None:
        model = Model()
        limits = BatchLimits(max_batch_size=max_batch_size, max_in_flight=max_in_flight)
        batcher = Batcher(model, limits)
        starts = np.cumsum([0, *sizes[:-1]]).tolist()
        requests = [
            rows(*range(start, start + size)) for start, size in zip(starts, sizes, strict=True)
        ]
        answers = await asyncio.gather(*(batcher.submit(request) for request in requests))
        for request, answer in zip(requests, answers, strict=True):
            np.testing.assert_array_equal(answer["y"], request["x"] * 2)
        assert model.order == list(range(sum(sizes)))
        assert all(size <= max(max_batch_size, max(sizes)) for size in model.sizes)
        assert model.most_at_once <= max_in_flight

    asyncio.run(scenario())


async def test_one_poisoned_request_harms_no_neighbour() -> None:
    model = Model(held=True)
    batcher = Batcher(model)
    tasks = await queue_up(batcher, rows(0), rows(1), rows(POISON), rows(2))
    model.let_go()
    answers: list[Any] = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(answers[2], InputError)
    assert [answers[i]["y"][0, 0] for i in (0, 1, 3)] == [0, 2, 4]


async def test_requests_of_other_shapes_are_not_joined() -> None:
    model = Model(held=True)
    batcher = Batcher(model)
    tasks = await queue_up(batcher, rows(0), rows(1), rows(2, width=3), rows(3), rows(4, width=3))
    await asyncio.sleep(0)
    model.let_go()
    answers = await asyncio.gather(*tasks)
    assert model.sizes == [1, 2, 2]
    assert [answer["y"].shape for answer in answers] == [(1, 2), (1, 2), (1, 3), (1, 2), (1, 3)]


async def test_a_model_that_cannot_join_gets_requests_one_by_one() -> None:
    model = Model()
    batcher = Batcher(model, BatchLimits(can_join=False))
    await asyncio.gather(*(batcher.submit(rows(i, i)) for i in range(5)))
    assert model.sizes == [2] * 5


async def test_a_full_queue_refuses_at_once() -> None:
    model = Model(held=True)
    batcher = Batcher(model, BatchLimits(max_queued=2))
    tasks = await queue_up(batcher, rows(0))
    await asyncio.sleep(0)
    tasks += await queue_up(batcher, rows(1), rows(2))
    with pytest.raises(OverloadedError, match="full, with 2 waiting"):
        await batcher.submit(rows(3))
    model.let_go()
    assert len(await asyncio.gather(*tasks)) == 3


async def test_a_request_whose_client_has_gone_is_not_computed() -> None:
    model = Model(held=True)
    batcher = Batcher(model)
    tasks = await queue_up(batcher, rows(0), rows(1), rows(2))
    await asyncio.sleep(0)
    tasks[1].cancel()
    await asyncio.sleep(0)
    model.let_go()
    await asyncio.gather(tasks[0], tasks[2])
    assert model.order == [0, 2]


async def test_a_silent_model_times_out_and_the_next_request_is_served() -> None:
    model = Model(held=True)
    batcher = Batcher(model, BatchLimits(timeout_s=0.05))
    with pytest.raises(UpstreamTimeoutError, match=r"within 0\.05 s"):
        await batcher.submit(rows(0))
    model.let_go()
    assert (await batcher.submit(rows(1)))["y"][0, 0] == 2


async def test_a_request_waits_for_its_limit_in_all_also_where_it_is_asked_again() -> None:
    ended: list[str] = []
    later: asyncio.Task[None] | None = None

    async def silent(_: Arrays) -> Arrays:
        await asyncio.Event().wait()
        raise AssertionError

    async def fails_late(arrays: Arrays) -> Arrays:
        nonlocal later
        if later is None:
            await asyncio.sleep(0.05)
            limits = BatchLimits(timeout_s=0.48)
            later = asyncio.create_task(ask("a moment later", Batcher(silent, limits)))
            raise UpstreamFailedError("the replica died")
        return await silent(arrays)

    async def ask(name: str, batcher: Batcher) -> None:
        with pytest.raises(UpstreamTimeoutError):
            await batcher.submit(rows(0))
        ended.append(name)

    await ask("first", Batcher(fails_late, BatchLimits(timeout_s=0.5)))
    assert later is not None
    await later
    assert ended == ["first", "a moment later"]


async def test_a_replica_that_dies_costs_one_retry_not_the_request() -> None:
    calls = 0

    async def dies_once(arrays: Arrays) -> Arrays:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise UpstreamFailedError("the replica died")
        return {"y": arrays["x"]}

    assert (await Batcher(dies_once).submit(rows(7)))["y"][0, 0] == 7
    assert calls == 2


async def test_a_request_that_kills_replicas_takes_nobody_with_it_twice() -> None:
    """Two replicas; whatever is on one together with the poison dies with it."""
    on_replica: dict[int, list[asyncio.Future[None]]] = {0: [], 1: []}
    num_deaths = 0

    async def replicas(arrays: Arrays) -> Arrays:
        nonlocal num_deaths
        number = min(on_replica, key=lambda n: len(on_replica[n]))
        death: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        on_replica[number].append(death)
        try:
            await asyncio.wait([death], timeout=0.002)
            if (arrays["x"] == POISON).any() and not death.done():
                num_deaths += 1
                for other in on_replica[number]:
                    other.set_result(None)
            if death.done():
                raise UpstreamFailedError("the replica died")
            return {"y": arrays["x"] * 2}
        finally:
            on_replica[number].remove(death)

    batcher = Batcher(replicas, BatchLimits(max_batch_size=4, max_in_flight=4))
    values = [1.0] * 10 + [POISON] + [2.0] * 20
    answers = await asyncio.gather(
        *(batcher.submit(rows(value)) for value in values), return_exceptions=True
    )
    failed = [
        value
        for value, answer in zip(values, answers, strict=True)
        if isinstance(answer, Exception)
    ]
    assert failed == [POISON]
    assert num_deaths == 2


async def test_a_call_that_nobody_waits_for_is_ended_and_one_that_somebody_does_is_not() -> None:
    model = Model(held=True)
    batcher = Batcher(model)
    tasks = await queue_up(batcher, rows(0))
    await asyncio.sleep(0)
    tasks[0].cancel()
    await asyncio.wait(tasks)
    await asyncio.sleep(0.01)
    assert (batcher.num_in_flight, batcher.num_waiting) == (0, 0)

    tasks = await queue_up(batcher, rows(1))
    await asyncio.sleep(0)
    tasks += await queue_up(batcher, rows(2), rows(3), rows(4))
    tasks[3].cancel()
    await asyncio.wait([tasks[3]])
    assert batcher.num_waiting == 2
    model.let_go()
    await tasks[0]
    tasks[1].cancel()
    assert (await tasks[2])["y"][0, 0] == 6
    await asyncio.sleep(0)
    assert (batcher.num_in_flight, batcher.num_waiting) == (0, 0)


async def test_what_waited_too_long_is_not_sent_any_more() -> None:
    model = Model(held=True)
    batcher = Batcher(model, BatchLimits(timeout_s=0.05))
    tasks = await queue_up(batcher, rows(0))
    await asyncio.sleep(0)
    tasks += await queue_up(batcher, rows(1))
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(answer) for answer in answers] == [UpstreamTimeoutError] * 2
    assert model.order == [0]


async def test_an_overloaded_replica_is_not_asked_once_more_for_each_request() -> None:
    calls = 0

    async def full(arrays: Arrays) -> Arrays:
        nonlocal calls
        calls += 1
        await asyncio.sleep(0)
        raise OverloadedError("no room")

    batcher = Batcher(full)
    answers = await asyncio.gather(
        *(batcher.submit(rows(i)) for i in range(9)), return_exceptions=True
    )
    assert {type(answer) for answer in answers} == {OverloadedError}
    assert calls == 2


async def test_outputs_that_mix_samples_fail_only_joined_calls() -> None:
    async def summing(arrays: Arrays) -> Arrays:
        await asyncio.sleep(0)
        return {"total": arrays["x"].sum(axis=0, keepdims=True)}

    answers = await asyncio.gather(
        *(b.submit(rows(i)) for b in [Batcher(summing)] for i in (1, 2, 3))
    )
    assert [answer["total"][0, 0] for answer in answers] == [1, 2, 3]


async def test_closing_answers_what_waits_and_refuses_what_comes() -> None:
    model = Model(held=True)
    batcher = Batcher(model, BatchLimits(max_batch_size=1))
    tasks = await queue_up(batcher, rows(0))
    await asyncio.sleep(0)
    tasks += await queue_up(batcher, rows(1), rows(2))
    closing = asyncio.create_task(batcher.close(patience_s=60))
    await asyncio.sleep(0)
    with pytest.raises(UpstreamFailedError):
        await batcher.submit(rows(3))
    model.let_go()
    answers: list[Any] = await asyncio.gather(*tasks)
    assert [answer["y"][0, 0] for answer in answers] == [0, 2, 4]
    await closing


async def test_closing_without_patience_refuses_what_waits_and_finishes_what_flies() -> None:
    model = Model(held=True)
    batcher = Batcher(model)
    tasks = await queue_up(batcher, rows(0))
    await asyncio.sleep(0)
    tasks += await queue_up(batcher, rows(1))
    await batcher.close(patience_s=0)
    model.let_go()
    answers: list[Any] = await asyncio.gather(*tasks, return_exceptions=True)
    assert answers[0]["y"][0, 0] == 0
    assert isinstance(answers[1], UpstreamFailedError)
    with pytest.raises(UpstreamFailedError):
        await batcher.submit(rows(2))


def test_a_graph_whose_samples_share_a_scale_is_not_joined() -> None:
    """An outlier would cost everybody else in its call their precision."""
    manifest = graph_manifest()
    assert can_join(manifest)
    scaled = {"method": "int8_dynamic", "num_bits": 8}
    assert not can_join(manifest.model_copy(update={"quantisation": scaled}))
    fixed = {"method": "int8_static", "num_bits": 8}
    assert can_join(manifest.model_copy(update={"quantisation": fixed}))
