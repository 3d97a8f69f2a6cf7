"""Structured answers as OpenAI's own client asks for them, and what is refused."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from typing import Any, Literal

import openai
import pydantic
import pytest

CHAT: list[Any] = [{"role": "user", "content": "What follows the sun?"}]
PLACE = {
    "type": "object",
    "properties": {"mirrors": {"type": "integer", "minimum": 0, "maximum": 999}},
    "required": ["mirrors"],
    "additionalProperties": False,
}


class Answer(pydantic.BaseModel):
    name: Literal["heliostat", "sunflower"]
    mirrors: int = pydantic.Field(ge=0, le=999)
    is_bright: bool


@pytest.fixture
async def client(gateway: Any, server_url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    key = gateway.headers()["authorization"].removeprefix("Bearer ")
    async with openai.AsyncOpenAI(
        base_url=f"{server_url}/v1", api_key=key, max_retries=0
    ) as client:
        yield client


def schema_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


async def test_the_official_client_parses_answers_into_its_own_types(
    client: openai.AsyncOpenAI,
) -> None:
    answer = await client.chat.completions.parse(
        model="talker", messages=CHAT, response_format=Answer, temperature=1.5, seed=3, n=2
    )
    parsed = [choice.message.parsed for choice in answer.choices]
    assert all(isinstance(each, Answer) for each in parsed)
    assert [choice.finish_reason for choice in answer.choices] == ["stop", "stop"]


async def test_a_stream_of_json_is_whole_in_the_end(client: openai.AsyncOpenAI) -> None:
    text = ""
    stream = await client.chat.completions.create(
        model="talker",
        messages=CHAT,
        response_format=schema_format(PLACE),  # type: ignore[arg-type]
        seed=5,
        stream=True,
    )
    async for chunk in stream:
        text += chunk.choices[0].delta.content or ""
    assert 0 <= json.loads(text)["mirrors"] <= 999


async def test_any_object_is_an_object(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="talker",
        messages=CHAT,
        response_format={"type": "json_object"},
        # Closing what is open is far likelier than opening more.
        logit_bias={str(token): 30 for token in (3 + ord("}"), 3 + ord('"'), 3 + ord("1"))},
        seed=1,
        max_tokens=150,
    )
    text = answer.choices[0].message.content or ""
    assert text.startswith("{")
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


async def test_an_expression_goes_in_the_extra_body(client: openai.AsyncOpenAI) -> None:
    pattern = r"(sun|moon){2}-\d{3}"
    for endpoint in ("chat", "completions"):
        extra = {"structured_outputs": {"regex": pattern}}
        if endpoint == "chat":
            chat = await client.chat.completions.create(
                model="talker", messages=CHAT, extra_body=extra
            )
            text = chat.choices[0].message.content or ""
        else:
            whole = await client.completions.create(
                model="talker", prompt="a", max_tokens=64, extra_body=extra
            )
            text = whole.choices[0].text
        assert re.fullmatch(pattern, text), text


@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type", "'json_object'"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "type"),
        (
            {"response_format": {**schema_format({}), "type": "text"}},
            "response_format.json_schema",
            "type is 'text'",
        ),
        (
            {"response_format": schema_format({"type": "objet"})},
            "response_format.json_schema.schema",
            "objet",
        ),
        (
            {"response_format": schema_format({"type": "array", "uniqueItems": True})},
            "response_format.json_schema.schema",
            "uniqueItems",
        ),
        (
            {"response_format": schema_format({"$ref": "#"})},
            "response_format.json_schema.schema",
            "no text satisfies it",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a b", "schema": {}},
                }
            },
            "response_format.json_schema.name",
            "pattern",
        ),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs.regex", "unclosed group"),
        ({"structured_outputs": {"regex": "a" * 9000}}, "structured_outputs.regex", "8192"),
        ({"structured_outputs": {"grammar": "a"}}, "structured_outputs", "missing"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs",
            "both set",
        ),
    ],
)  # fmt: skip
async def test_what_cannot_be_followed_is_refused_by_name(
    gateway: Any, changes: dict[str, Any], param: str, words: str
) -> None:
    body = {"model": "talker", "messages": CHAT} | changes
    answer = await gateway.client.post("/v1/chat/completions", json=body, headers=gateway.headers())
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"].startswith(param)
    assert words in error["message"]


async def test_a_hostile_expression_fails_alone_while_others_are_answered(gateway: Any) -> None:
    """It compiles, and turns out on the way to be more than its limits allow."""
    hostile = {"structured_outputs": {"regex": "(((a{1000}){1000}){1000})"}}

    async def ask(changes: dict[str, Any]) -> Any:
        body = {"model": "talker", "prompt": "abc", "max_tokens": 64} | changes
        return await gateway.client.post("/v1/completions", json=body, headers=gateway.headers())

    started_s = time.process_time()
    answers = await asyncio.gather(*(ask(changes) for changes in [hostile, {}, hostile, {}]))
    assert [answer.status_code for answer in answers] == [400, 200, 400, 200]
    assert "regular expression is refused" in answers[0].json()["error"]["message"]
    assert answers[0].json()["error"]["param"] == "structured_outputs.regex"
    assert gateway.engine.stats().num_running == 0
    # Far above what the limits allow, far below what goes on for ever.
    assert time.process_time() - started_s < 10


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs.regex"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"response_format": schema_format(PLACE)}, "response_format.json_schema.schema"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_an_engine_cannot_follow_is_named_as_the_client_does(
    gateway: Any, changes: dict[str, Any], param: str, stream: bool
) -> None:
    body = {"model": "mute", "prompt": "abc", "stream": stream} | changes
    answer = await gateway.client.post("/v1/completions", json=body, headers=gateway.headers())
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


async def test_text_is_what_there_is_anyway(gateway: Any) -> None:
    body = {"model": "talker", "messages": CHAT, "temperature": 0, "max_tokens": 8}
    texts = []
    for changes in ({}, {"response_format": {"type": "text"}}, {"response_format": None}):
        answer = await gateway.client.post(
            "/v1/chat/completions", json=body | changes, headers=gateway.headers()
        )
        texts.append(answer.json()["choices"][0]["message"]["content"])
    assert len(set(texts)) == 1
