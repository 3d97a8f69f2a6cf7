"""OpenAI's protocol, as its own client and plain HTTP see it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

CHINESE = "定日镜跟随太阳，把光线投向塔顶🌞"


def body(**changes: Any) -> dict[str, Any]:
    return {"model": "talker", "prompt": "abc", "temperature": 0, "max_tokens": 8} | changes


def events(text: str) -> list[Any]:
    """Decoded server-sent events; the last is the text [DONE]."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


async def post(gateway: Any, path: str, **values: Any) -> Any:
    return await gateway.client.post(f"/v1/{path}", json=values, headers=gateway.headers())


async def test_models_are_listed_and_shown(gateway: Any) -> None:
    answer = await gateway.client.get("/v1/models", headers=gateway.headers())
    cards = {card["id"]: card for card in answer.json()["data"]}
    assert set(cards) == {"talker", "mute", "classes"}
    assert cards["talker"]["object"] == "model"
    assert cards["talker"]["max_model_len"] == 256
    for name in ("classes", "classes@previous", "classes/1"):
        card = (await gateway.client.get(f"/v1/models/{name}", headers=gateway.headers())).json()
        assert card["id"] == name
    missing = await gateway.client.get("/v1/models/none", headers=gateway.headers())
    assert missing.status_code == 404
    assert "there are: broken, classes, mute, talker" in missing.json()["error"]["message"]


async def test_a_broken_package_hides_no_other_model_and_is_named(gateway: Any) -> None:
    listed = await gateway.client.get("/v1/models", headers=gateway.headers())
    assert "broken" not in {card["id"] for card in listed.json()["data"]}
    answer = await post(gateway, "completions", **body(model="broken"))
    assert answer.status_code == 422
    assert answer.json()["error"]["code"] == "package_changed_file"


async def test_a_completion_has_text_usage_and_headers(gateway: Any) -> None:
    answer = await post(gateway, "completions", **body(prompt=CHINESE, max_tokens=200))
    values = answer.json()
    assert answer.headers["x-model-version"] == "talker/1"
    assert values["object"] == "text_completion"
    assert values["model"] == "talker"
    choice = values["choices"][0]
    assert choice["text"].startswith(CHINESE * 2)
    assert choice["finish_reason"] == "length"
    usage = values["usage"]
    assert usage["completion_tokens"] == 200
    assert usage["total_tokens"] == usage["prompt_tokens"] + 200


async def test_a_stream_never_splits_a_character_and_equals_the_whole(gateway: Any) -> None:
    request = body(prompt=CHINESE, max_tokens=100)
    whole = (await post(gateway, "completions", **request)).json()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    answer = await post(gateway, "completions", **request, **options)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *chunks, usage, done = events(answer.text)
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"] == whole["usage"]
    pieces = [chunk["choices"][0]["text"] for chunk in chunks]
    assert "".join(pieces) == whole["choices"][0]["text"]
    assert not any("\ufffd" in piece for piece in pieces[:-2])
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-2:] == [None, "length"]
    assert len({chunk["id"] for chunk in chunks}) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_stop_strings_end_the_answer_before_them(gateway: Any, stream: bool) -> None:
    request = body(prompt="one two three", max_tokens=200, stop=["two t", "xyz"], stream=stream)
    answer = await post(gateway, "completions", **request)
    if stream:
        chunks = events(answer.text)[:-1]
        text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        reason = chunks[-1]["choices"][0]["finish_reason"]
    else:
        text, reason = (answer.json()["choices"][0][key] for key in ("text", "finish_reason"))
    assert (text, reason) == ("one ", "stop")
    assert gateway.engine.stats().num_running == 0


async def test_an_end_of_sequence_token_ends_the_answer_and_is_not_shown(gateway: Any) -> None:
    values = (await post(gateway, "completions", **body(prompt=[70, 71, 0], max_tokens=9))).json()
    choice = values["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert "<|end|>" not in choice["text"]
    assert values["usage"]["completion_tokens"] == 3


async def test_a_seed_repeats_an_answer(gateway: Any) -> None:
    async def ask(seed: int) -> str:
        request = body(temperature=1.0, seed=seed, max_tokens=32)
        answer = await post(gateway, "completions", **request)
        return str(answer.json()["choices"][0]["text"])

    first, again, other = await ask(7), await ask(7), await ask(8)
    assert first == again != other


async def test_chat_goes_through_the_template(gateway: Any) -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "hello "}, {"type": "text", "text": "you"}],
        },
    ]
    request = {"model": "talker", "messages": messages, "temperature": 0, "max_tokens": 6}
    whole = (await post(gateway, "chat/completions", **request)).json()
    assert whole["object"] == "chat.completion"
    message = whole["choices"][0]["message"]
    # The fake engine repeats the prompt, whose turn markers are special and not shown; the first
    # turn ends with the model's end token.
    assert message == {"role": "assistant", "content": "be brief"[: len(message["content"])]}
    streamed = events((await post(gateway, "chat/completions", **request, stream=True)).text)
    assert streamed[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert streamed[0]["object"] == "chat.completion.chunk"
    pieces = [event["choices"][0]["delta"].get("content", "") for event in streamed[:-1]]
    assert "".join(pieces) == message["content"]


async def test_chat_without_max_tokens_uses_the_room_there_is(gateway: Any) -> None:
    request = {"model": "talker", "messages": [{"role": "user", "content": "x" * 50}], "seed": 1}
    answer = await post(gateway, "chat/completions", **request)
    assert answer.status_code == 200
    assert answer.json()["usage"]["total_tokens"] <= 256


async def test_chat_without_a_template_is_refused_with_the_way_out(gateway: Any) -> None:
    request = {"model": "mute", "messages": [{"role": "user", "content": "hi"}]}
    answer = await post(gateway, "chat/completions", **request)
    assert answer.status_code == 400
    assert "no chat template" in answer.json()["error"]["message"]
    assert "/v1/completions" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 65}, "n", "make 65 answers, at most 64"),
        ({"n": 10**30}, "n", "less than or equal to 128"),
        ({"best_of": 3}, "best_of", "not supported"),
        ({"n": 2, "best_of": 3}, "best_of", "not supported"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"logprobs": True}, "logprobs", "valid integer"),
        ({"echo": True, "logprobs": 1}, "echo", "not supported with 'logprobs'"),
        ({"presence_penalty": 2.5}, "presence_penalty", "less than or equal to 2"),
        ({"frequency_penalty": "1"}, "frequency_penalty", "number"),
        ({"repetition_penalty": 0}, "repetition_penalty", "greater than"),
        ({"min_p": 1.5}, "min_p", "less than or equal to 1"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "less than or equal to 100"),
        ({"logit_bias": {"five": 1}}, "logit_bias.five", "pattern"),
        ({"logit_bias": {"999999": 1}}, "logit_bias", "not in the vocabulary"),
        ({"logit_bias": {str(i): 1 for i in range(2000)}}, "logit_bias", "at most 1024"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"suffix": "end"}, "suffix", "not supported"),
        ({"ignore_eos": True}, "ignore_eos", "leave it out, or send false"),
        ({"temprature": 1}, "temprature", "not known"),
        ({"temperature": -0.1}, "temperature", "greater than or equal to 0"),
        ({"temperature": 2.1}, "temperature", "less than or equal to 2"),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"top_k": -2}, "top_k", "greater than or equal to -1"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 1.5}, "max_tokens", "integer"),
        ({"max_tokens": 10_000}, "max_tokens", "holds 256 tokens"),
        ({"max_tokens": 40_000}, "max_tokens", "at most 32768 are allowed"),
        ({"prompt": "x" * 400}, "prompt", "has 400 tokens, and the model holds 256 tokens"),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": "x" * 50_000}, "prompt", "has 50000 characters, at most"),
        ({"prompt": [1] * 20_000}, "prompt", "holds 256 tokens"),
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": [[]]}, "prompt", "empty"),
        ({"prompt": ["a", ""]}, "prompt", "empty"),
        ({"prompt": ["a", 1]}, "prompt", "valid string"),
        ({"prompt": ["a"] * 65}, "prompt", "make 65 answers, at most 64"),
        ({"prompt": ["a"] * 9, "n": 8}, "n", "make 72 answers"),
        ({"prompt": [10_000]}, "prompt", "not in the vocabulary"),
        ({"prompt": [-1]}, "prompt", "not in the vocabulary"),
        ({"prompt": 5}, "prompt", "valid"),
        ({"prompt": "\ud800"}, "prompt", "surrogate"),
        ({"prompt": ["a", "\ud800"]}, "prompt.1", "surrogate"),
        ({"stop": ["a", "b\udfff"]}, "stop.1", "surrogate"),
        ({"stop": ["a"] * 17}, "stop", "at most 16 items, not 17"),
        ({"stop": ["a"] * 10_000}, "stop", "at most 16"),
        ({"stop": [""]}, "stop.0", "at least 1 character"),
        ({"stop": "x" * 300}, "stop", "at most 256 characters"),
        ({"seed": 2**63}, "seed", "less than"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "not known"),
        ({"model": None}, "model", "valid string"),
        ({"model": "classes"}, "model", "generates no text"),
    ],
)
async def test_what_cannot_be_done_is_refused_by_name(
    gateway: Any, changes: dict[str, Any], param: str | None, words: str
) -> None:
    answer = await gateway.client.post(
        "/v1/completions", content=json.dumps(body(**changes)), headers=gateway.headers()
    )
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert words in error["message"]


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "hello",
        [{"role": "robot", "content": "x"}],
        [{"role": "user"}],
        [{"role": "user", "content": "x", "tool_calls": []}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}],
    ],
)
async def test_messages_that_are_none_are_refused(gateway: Any, messages: Any) -> None:
    answer = await post(gateway, "chat/completions", model="talker", messages=messages)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"].startswith("messages")


@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"messages": [{"role": "user", "content": "x" * 50_000}]}, "messages", "50000 characters"),
        ({"messages": [{"role": "user", "content": "x" * 400}]}, "messages", "holds 256 tokens"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages.0.content", "surrogate"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens", "are both set"),
        ({"max_completion_tokens": 256}, "max_completion_tokens", "holds 256 tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "greater than or equal to 1"),
        ({"top_logprobs": 3}, "top_logprobs", "needs 'logprobs': true"),
        ({"logprobs": False, "top_logprobs": 3}, "top_logprobs", "needs 'logprobs': true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"logprobs": 3}, "logprobs", "valid boolean"),
        ({"stop": ["a"] * 10_000}, "stop", "at most 16"),
        ({"n": 65}, "n", "make 65 answers"),
    ],
)
async def test_what_cannot_be_said_is_refused_by_name_and_others_go_on(
    gateway: Any, changes: dict[str, Any], param: str, words: str
) -> None:
    messages = [{"role": "user", "content": "hi"}]
    chat = {"model": "talker", "messages": messages, "max_completion_tokens": 60, "temperature": 0}
    alone = (await post(gateway, "chat/completions", **chat)).json()["choices"]
    beside = asyncio.create_task(post(gateway, "chat/completions", **chat))
    while gateway.engine.stats().num_running == 0:  # noqa: ASYNC110
        await asyncio.sleep(0)
    bad = {"model": "talker", "messages": messages} | changes
    answer = await gateway.client.post(
        "/v1/chat/completions", content=json.dumps(bad), headers=gateway.headers()
    )
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert words in error["message"]
    assert (await beside).json()["choices"] == alone


@pytest.mark.parametrize(
    "harmless",
    [
        {"n": 1}, {"logprobs": None}, {"presence_penalty": 0.0}, {"logit_bias": {}},
        {"user": "u-1"}, {"echo": False}, {"best_of": 1}, {"top_k": -1}, {"seed": None},
        {"max_tokens": 8.0}, {"prompt": [70.0, 71]},
    ],
)  # fmt: skip
async def test_parameters_at_values_that_change_nothing_are_taken(
    gateway: Any, harmless: dict[str, Any]
) -> None:
    assert (await post(gateway, "completions", **body(**harmless))).status_code == 200


async def test_special_tokens_in_a_prompt_are_plain_text(gateway: Any) -> None:
    values = (await post(gateway, "completions", **body(prompt="<|end|>", max_tokens=7))).json()
    assert values["choices"][0]["text"] == "<|end|>"[: len(values["choices"][0]["text"])]
    assert values["usage"]["completion_tokens"] == 7


async def test_an_engine_that_breaks_mid_stream_ends_it_with_an_error_event(gateway: Any) -> None:
    async def break_soon() -> None:
        while gateway.engine.stats().num_running == 0:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.02)
        gateway.engine.fail("out of memory")

    breaking = asyncio.create_task(break_soon())
    answer = await post(gateway, "completions", **body(max_tokens=240, stream=True))
    await breaking
    *_, error, done = events(answer.text)
    assert done == "[DONE]"
    assert "out of memory" in error["error"]["message"]
    later = await post(gateway, "completions", **body())
    assert later.status_code == 502


async def test_several_prompts_and_choices_are_those_that_each_alone_would_give(
    gateway: Any,
) -> None:
    request = body(temperature=1.0, seed=7, n=3, max_tokens=12)
    together = (await post(gateway, "completions", **request | {"prompt": ["ab", "xyz"]})).json()
    assert [choice["index"] for choice in together["choices"]] == list(range(6))
    texts = [choice["text"] for choice in together["choices"]]
    assert len(set(texts[:3])) == 3
    alone = [
        (await post(gateway, "completions", **request | {"prompt": prompt})).json()
        for prompt in ("ab", "xyz")
    ]
    assert texts == [choice["text"] for values in alone for choice in values["choices"]]
    fewer = (await post(gateway, "completions", **request | {"prompt": "ab", "n": 1})).json()
    assert fewer["choices"][0]["text"] == texts[0]
    prompt_tokens = [values["usage"]["prompt_tokens"] for values in alone]
    assert together["usage"] == {
        "prompt_tokens": sum(prompt_tokens),
        "completion_tokens": 6 * 12,
        "total_tokens": sum(prompt_tokens) + 6 * 12,
    }


async def test_choices_are_streamed_side_by_side(gateway: Any) -> None:
    request = body(prompt=["ab", "one two"], n=2, temperature=1.0, seed=3, max_tokens=40)
    whole = (await post(gateway, "completions", **request)).json()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    answer = await post(gateway, "completions", **request, **options)
    *chunks, usage, done = events(answer.text)
    assert (usage["usage"], done) == (whole["usage"], "[DONE]")
    choices = [chunk["choices"][0] for chunk in chunks]
    assert len({choice["index"] for choice in choices[:12]}) == 4, "none waits for another"
    for expected in whole["choices"]:
        mine = [choice for choice in choices if choice["index"] == expected["index"]]
        assert "".join(choice["text"] for choice in mine) == expected["text"]
        reasons = [choice["finish_reason"] for choice in mine]
        assert reasons == [None] * (len(mine) - 1) + ["length"]


async def test_one_choice_too_many_for_the_engine_refuses_all(gateway: Any) -> None:
    answer = await post(gateway, "completions", **body(model="mute", n=4, max_tokens=200))
    assert answer.status_code == 503
    again = await post(gateway, "completions", **body(model="mute", n=3, max_tokens=1))
    assert again.status_code == 200, "their places are free again"


@pytest.mark.parametrize("prompt", ["one two", [70, 71, 72]])
@pytest.mark.parametrize("stream", [False, True])
async def test_an_echo_is_the_prompt_before_the_answer(
    gateway: Any, prompt: Any, stream: bool
) -> None:
    request = body(prompt=prompt, max_tokens=5, n=2)
    plain = (await post(gateway, "completions", **request)).json()
    answer = await post(gateway, "completions", **request, echo=True, stream=stream)
    if stream:
        choices = [chunk["choices"][0] for chunk in events(answer.text)[:-1]]
        text = "".join(choice["text"] for choice in choices if choice["index"] == 1)
    else:
        text = answer.json()["choices"][1]["text"]
    shown = prompt if isinstance(prompt, str) else plain["choices"][1]["text"][:3]
    assert text == shown + plain["choices"][1]["text"]


async def test_log_probabilities_of_a_completion(gateway: Any) -> None:
    request = body(prompt=CHINESE, max_tokens=30, logprobs=2)
    choice = (await post(gateway, "completions", **request)).json()["choices"][0]
    found = choice["logprobs"]
    assert len(found["tokens"]) == len(found["token_logprobs"]) == len(found["top_logprobs"]) == 30
    for token, logprob, top in zip(
        found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True
    ):
        assert top[token] == pytest.approx(logprob)
        assert max(top.values()) == pytest.approx(logprob), "greedy: the most likely"
    for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
        if "\ufffd" not in token:
            assert choice["text"][offset:].startswith(token)
    answer = await post(gateway, "completions", **request, stream=True)
    chunks = [chunk["choices"][0]["logprobs"] for chunk in events(answer.text)[:-2]]
    for name, values in found.items():
        assert [value for chunk in chunks for value in chunk[name]] == values


async def test_log_probabilities_end_where_the_text_does(gateway: Any) -> None:
    request = body(prompt="one two three", max_tokens=90, stop="two t", logprobs=0)
    choice = (await post(gateway, "completions", **request)).json()["choices"][0]
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"] == "one "


async def test_log_probabilities_of_a_chat(gateway: Any) -> None:
    request = {
        "model": "talker", "messages": [{"role": "user", "content": "hi"}],
        "max_completion_tokens": 6, "temperature": 0,
    }  # fmt: skip
    assert (await post(gateway, "chat/completions", **request)).json()["choices"][0][
        "logprobs"
    ] is None
    values = (
        await post(gateway, "chat/completions", **request, logprobs=True, top_logprobs=3)
    ).json()
    content = values["choices"][0]["logprobs"]["content"]
    assert len(content) == 3, "the end-of-sequence token is none of them"
    assert all(len(entry["top_logprobs"]) == 3 for entry in content)
    assert all(bytes(entry["bytes"]).decode() == entry["token"] for entry in content)
    # The special token of the template, which the fake engine repeats, is no text.
    assert content[0]["token"] == "<|user|>"
    refused = await post(gateway, "chat/completions", **request, top_logprobs=3)
    assert refused.json()["error"]["param"] == "top_logprobs"


async def test_penalties_and_biases_reach_the_engine(gateway: Any) -> None:
    async def ask(**changes: Any) -> str:
        answer = await post(gateway, "completions", **body(prompt="aa", **changes))
        return str(answer.json()["choices"][0]["text"])

    assert await ask() == "aaaaaaaa"
    for changes in (
        {"presence_penalty": 2}, {"frequency_penalty": 1}, {"repetition_penalty": 10},
    ):  # fmt: skip
        assert await ask(**changes, logit_bias={"70": 1.5}) != "aaaaaaaa", changes
    assert len(set(await ask(logit_bias={"70": 100}))) == 1
    assert await ask(logit_bias={"70": 100}) != "aaaaaaaa"
    assert await ask(temperature=2, min_p=1, seed=1) == "aaaaaaaa"


@pytest.fixture
async def client(gateway: Any, server_url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    key = gateway.headers()["authorization"].removeprefix("Bearer ")
    async with openai.AsyncOpenAI(
        base_url=f"{server_url}/v1", api_key=key, max_retries=0
    ) as client:
        yield client


async def test_the_official_client_works_unmodified(client: openai.AsyncOpenAI) -> None:
    assert {model.id for model in (await client.models.list()).data} >= {"talker"}
    whole = await client.completions.create(
        model="talker/1", prompt=CHINESE, max_tokens=60, temperature=0, seed=1, stop="never"
    )
    assert CHINESE in whole.choices[0].text
    stream = await client.completions.create(
        model="talker", prompt=CHINESE, max_tokens=60, temperature=0, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].text
    assert chunks[-1].usage == whole.usage
    chat = await client.chat.completions.create(
        model="talker", messages=[{"role": "user", "content": "hi there"}], max_tokens=20, seed=3
    )
    assert chat.choices[0].message.role == "assistant"
    chat = await client.chat.completions.create(
        model="talker", messages=[{"role": "user", "content": "hi there"}], max_tokens=5, n=3,
        logprobs=True, top_logprobs=2, frequency_penalty=1, logit_bias={"70": 2}, seed=3,
    )  # fmt: skip
    assert [choice.index for choice in chat.choices] == [0, 1, 2]
    logprobs = chat.choices[2].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [len(entry.top_logprobs) for entry in logprobs.content] == [2] * 5
    shown = await client.models.retrieve("classes/1")
    assert shown.id == "classes/1"


async def test_the_official_client_raises_its_own_errors(
    client: openai.AsyncOpenAI, server_url: str
) -> None:
    with pytest.raises(openai.NotFoundError, match="not deployed"):
        await client.completions.create(model="none", prompt="a")
    with pytest.raises(openai.BadRequestError) as bad:
        await client.completions.create(model="talker", prompt="a", suffix="b")
    assert bad.value.param == "suffix"
    stranger = openai.AsyncOpenAI(base_url=f"{server_url}/v1", api_key="hst_wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        await stranger.models.list()
    await stranger.close()


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_frees_its_place(
    gateway: Any, client: openai.AsyncOpenAI, stream: bool
) -> None:
    gateway.engine._step_time_s = 0.02  # slow enough to leave in the middle
    asking = asyncio.create_task(
        client.completions.create(model="talker", prompt="ab", max_tokens=250, stream=stream)
    )
    while gateway.engine.stats().num_running == 0:  # noqa: ASYNC110
        await asyncio.sleep(0.005)
    if stream:
        await (await asking).close()
    else:
        asking.cancel()
    async with asyncio.timeout(3):  # the whole answer takes 5 s
        while gateway.engine.stats().num_running > 0:  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_too_many_open_streams_are_turned_away_at_once(
    gateway: Any, client: openai.AsyncOpenAI
) -> None:
    streams = [
        await client.completions.create(model="mute", prompt="a", max_tokens=200, stream=True)
        for _ in range(3)
    ]
    with pytest.raises(openai.InternalServerError, match="queue to this model is full") as refused:
        await client.completions.create(model="mute", prompt="a", max_tokens=2)
    assert refused.value.status_code == 503
    assert refused.value.response.headers["retry-after"] == "1"
    for stream in streams:
        await stream.close()
