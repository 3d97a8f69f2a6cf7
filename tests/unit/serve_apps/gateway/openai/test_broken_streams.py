"""A replica that dies under an answer, as OpenAI's own client sees it: not at all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

from cluster.database import open_database
from cluster.ledger import Ledger

PROMPT = "定日镜 follows the sun 🌞 "
SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.2, "seed": 11},
    {"temperature": 0, "frequency_penalty": 0.7},
    {"temperature": 0.9, "seed": 3, "n": 3},
    {"temperature": 0, "stop": "sun"},
]


@pytest.fixture
async def client(gateway: Any, server_url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    key = gateway.headers()["authorization"].removeprefix("Bearer ")
    async with openai.AsyncOpenAI(
        base_url=f"{server_url}/v1", api_key=key, max_retries=0
    ) as client:
        yield client


async def whole(client: openai.AsyncOpenAI, door: str, options: dict[str, Any]) -> Any:
    """What is said in each choice, and the usage; without ids and times."""
    if door == "chat":
        answer: Any = await client.chat.completions.create(
            model="talker",
            messages=[{"role": "user", "content": PROMPT}],
            max_tokens=40,
            logprobs=True,
            **options,
        )
    else:
        answer = await client.completions.create(
            model="talker", prompt=PROMPT, max_tokens=40, logprobs=1, **options
        )
    return [choice.model_dump() for choice in answer.choices], answer.usage.model_dump()


async def streamed(client: openai.AsyncOpenAI, door: str, options: dict[str, Any]) -> Any:
    """The text and log-probabilities of each choice, why it ended, and the usage."""
    options = options | {"stream": True, "stream_options": {"include_usage": True}}
    if door == "chat":
        chunks: Any = await client.chat.completions.create(
            model="talker",
            messages=[{"role": "user", "content": PROMPT}],
            max_tokens=40,
            logprobs=True,
            **options,
        )
    else:
        chunks = await client.completions.create(
            model="talker", prompt=PROMPT, max_tokens=40, logprobs=1, **options
        )
    said: dict[int, str] = {}
    logprobs: dict[int, list[Any]] = {}
    reasons: dict[int, list[str]] = {}
    usage: Any = None
    async for chunk in chunks:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text = choice.delta.content if door == "chat" else choice.text
            said[choice.index] = said.get(choice.index, "") + (text or "")
            if choice.logprobs is not None:
                found = choice.logprobs.content if door == "chat" else choice.logprobs.tokens
                logprobs.setdefault(choice.index, []).extend(found)
            if choice.finish_reason:
                reasons.setdefault(choice.index, []).append(choice.finish_reason)
    return said, logprobs, reasons, usage.model_dump()


@pytest.mark.parametrize("options", SAMPLINGS, ids=str)
@pytest.mark.parametrize("ask", [whole, streamed])
@pytest.mark.parametrize("door", ["chat", "completion"])
async def test_an_answer_whose_replica_dies_is_the_unbroken_one(
    gateway: Any, client: openai.AsyncOpenAI, door: str, ask: Any, options: dict[str, Any]
) -> None:
    unbroken = await ask(client, door, options)
    for num_tokens in (0, 1, 13):
        gateway.break_next_stream(num_tokens)
        assert await ask(client, door, options) == unbroken
    continuations = gateway.telemetry.instruments.continuations
    # With a stop string it may have been over before.
    assert continuations.labels("talker", "1", "failed")._value.get() >= 2


async def test_usage_of_a_broken_stream_is_charged_once(
    gateway: Any, client: openai.AsyncOpenAI
) -> None:
    gateway.break_next_stream(7)
    *_, usage = await streamed(client, "completion", {"temperature": 0})

    def charged() -> Any:
        database = open_database(gateway.database_url)
        (total,) = Ledger(database).totals() or (None,)
        return total

    async with asyncio.timeout(10):
        while (total := await asyncio.to_thread(charged)) is None:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    found = (total.num_requests, total.prompt_tokens, total.completion_tokens)
    assert found == (1, usage["prompt_tokens"], usage["completion_tokens"])
    assert usage["completion_tokens"] == 40


async def test_where_no_replica_is_left_an_error_event_ends_the_stream(
    gateway: Any, client: openai.AsyncOpenAI
) -> None:
    chunks = await client.completions.create(
        model="talker", prompt="abc", max_tokens=240, temperature=0, stream=True
    )
    assert (await anext(chunks)).choices[0].text
    gateway.engine.fail("the device fell off")
    with pytest.raises(openai.APIError, match="the device fell off"):
        _ = [chunk async for chunk in chunks]
