"""Embeddings from graphs that take text, token ids or numbers, by OpenAI's own client."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from cluster.model_package.manifest import Golden, Manifest
from cluster.processing import TensorSpec
from cluster.processing.text import TextProcessor
from serve_apps.gateway.backend import Arrays

MASK = TensorSpec(name="attention_mask", datatype="INT32", shape=(-1, -1))


def manifest(
    name: str, *inputs: TensorSpec, outputs: tuple[TensorSpec, ...] | None = None
) -> Manifest:
    vector = TensorSpec(name="vector", datatype="FP32", shape=(-1, 3))
    return Manifest(
        kind="graph", name=name, created_at="2026-01-01T00:00:00+00:00", files={},
        inputs=inputs, outputs=outputs or (vector,), golden=Golden(inputs={}, outputs={}),
    )  # fmt: skip


def spec(name: str, datatype: Any, *shape: int) -> TensorSpec:
    return TensorSpec(name=name, datatype=datatype, shape=shape)


def of_text(arrays: Arrays) -> Arrays:
    """Length, first and last byte."""
    rows = [[len(text), text[0], text[-1]] for text in arrays["text"].reshape(-1)]
    return {"vector": np.array(rows, dtype=np.float32)}


def of_tokens(arrays: Arrays) -> Arrays:
    """Number, first and last id; padding would show."""
    ids, mask = arrays["input_ids"], arrays["attention_mask"]
    columns = [mask.sum(axis=1), ids[:, 0], ids[:, -1]]
    return {"vector": np.stack(columns, axis=1).astype(np.float32)}


def of_numbers(arrays: Arrays) -> Arrays:
    return {"vector": arrays["x"] * np.float32(0.1)}


@pytest.fixture
def graphs(gateway: Any, models_dir: Path) -> None:
    ids = spec("input_ids", "INT64", -1, -1)
    gateway.serve_graph(manifest("words", spec("text", "BYTES", -1, 1)), of_text)
    gateway.serve_graph(
        manifest("tokens", ids, MASK), of_tokens, TextProcessor.load(models_dir / "talker")
    )
    gateway.serve_graph(manifest("ids", ids, MASK), of_tokens)
    gateway.serve_graph(manifest("numbers", spec("x", "FP32", -1, 3)), of_numbers)


@pytest.fixture
async def client(gateway: Any, graphs: None, server_url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    key = gateway.headers()["authorization"].removeprefix("Bearer ")
    async with openai.AsyncOpenAI(
        base_url=f"{server_url}/v1", api_key=key, max_retries=0
    ) as client:
        yield client


async def vectors(client: openai.AsyncOpenAI, **values: Any) -> list[list[float]]:
    answer = await client.embeddings.create(**values)
    assert [item.index for item in answer.data] == list(range(len(answer.data)))
    assert answer.model == values["model"]
    return [item.embedding for item in answer.data]


async def test_text_gives_vectors_in_order(client: openai.AsyncOpenAI) -> None:
    # The client asks for base64 and decodes it; more inputs than the model takes in one batch.
    texts = [chr(97 + i) * (i + 1) for i in range(10)]
    found = await vectors(client, model="words/1", input=texts)
    assert found == [[i + 1, 97 + i, 97 + i] for i in range(10)]
    assert await vectors(client, model="words/1", input="abc") == [[3, 97, 99]]
    assert await vectors(client, model="words/1", input=texts, encoding_format="float") == found


async def test_token_ids_are_taken_as_they_are_and_never_padded(
    client: openai.AsyncOpenAI,
) -> None:
    found = await vectors(client, model="ids/1", input=[[5, 6, 7], [8], [9, 4, 2], [1, 3]])
    assert found == [[3, 5, 7], [1, 8, 8], [3, 9, 2], [2, 1, 3]]
    answer = await client.embeddings.create(model="ids/1", input=[5, 6, 7])
    assert (answer.data[0].embedding, answer.usage.prompt_tokens) == ([3, 5, 7], 3)


async def test_text_becomes_tokens_where_the_package_has_a_tokenizer(
    client: openai.AsyncOpenAI, models_dir: Path
) -> None:
    text = TextProcessor.load(models_dir / "talker")
    texts = ["the sun", "a", "<|end|>"]
    ids = [text.encode(one) for one in texts]
    assert len(ids[2]) > 1, "a special token that a user writes is plain text"
    found = await vectors(client, model="tokens/1", input=texts)
    assert found == [[len(one), one[0], one[-1]] for one in ids]
    answer = await client.embeddings.create(model="tokens/1", input=texts)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, ids))


async def test_numbers_are_one_vector_or_several(client: openai.AsyncOpenAI) -> None:
    one: Any = [1, 2.5, -3]
    several: Any = [[1, 2, 3], [4, 5, 6.5]]
    found = await vectors(client, model="numbers/1", input=one)
    np.testing.assert_allclose(found, [[0.1, 0.25, -0.3]], rtol=1e-6)
    found = await vectors(client, model="numbers/1", input=several, dimensions=3)
    np.testing.assert_allclose(found, [[0.1, 0.2, 0.3], [0.4, 0.5, 0.65]], rtol=1e-6)


async def test_both_encodings_hold_the_same_bits(gateway: Any, graphs: None) -> None:
    answers = {}
    for encoding in ("float", "base64", None):
        body = {"model": "numbers/1", "input": [0.1, 0.2, 0.3], "encoding_format": encoding}
        answer = await gateway.client.post(
            "/v1/embeddings", json=body, headers=gateway.headers("infer")
        )
        assert answer.headers["x-model-version"] == "numbers/1"
        answers[encoding] = answer.json()["data"][0]["embedding"]
    assert answers["float"] == answers[None]
    decoded = np.frombuffer(base64.b64decode(answers["base64"]), dtype="<f4")
    assert decoded.tolist() == np.array(answers["float"], dtype=np.float32).tolist()


@pytest.mark.parametrize(
    ("values", "param", "words"),
    [
        ({"model": "talker"}, "model", "is a language model"),
        ({"model": "two/1"}, "model", "gives no embeddings"),
        ({"model": "pairs/1"}, "model", "gives no embeddings"),
        ({"dimensions": 2}, "dimensions", "gives 3"),
        ({"encoding_format": "int8"}, "encoding_format", "'float' or 'base64'"),
        ({"truncate": True}, "truncate", "not known"),
        ({"input": []}, "input", "0 inputs"),
        ({"input": ""}, "input.0", "is empty"),
        ({"input": ["a", ""]}, "input.1", "is empty"),
        ({"input": ["a"] * 3000}, "input", "3000 inputs"),
        ({"input": [5]}, "input.0", "takes text"),
        ({"input": None}, "input", "valid"),
        ({"input": [["a"]]}, "input", "valid"),
        ({"model": "ids/1", "input": "a"}, "input.0", "no tokenizer"),
        ({"model": "ids/1", "input": [-1]}, "input.0", "no token id"),
        ({"model": "ids/1", "input": [2**31]}, "input.0", "no token id"),
        ({"model": "ids/1", "input": [1.5]}, "input.0", "no token id"),
        ({"model": "ids/1", "input": [1] * 9000}, "input.0", "at most 8192"),
        ({"model": "numbers/1", "input": "a"}, "input.0", "takes numbers"),
        ({"model": "numbers/1", "input": [1, 2]}, "input.0", "2 numbers, expected 3"),
        ({"model": "numbers/1", "input": [[1, 2, 3], [1]]}, "input.1", "1 numbers"),
        ({"model": "numbers/1", "input": [1e39, 0, 0]}, "input", "infinity"),
    ],
)
async def test_what_is_no_input_is_refused_by_name(
    gateway: Any, graphs: None, values: dict[str, Any], param: str, words: str
) -> None:
    numbers = spec("x", "FP32", -1, 3)
    gateway.serve_graph(manifest("two", numbers, spec("y", "FP32", -1, 3)), of_numbers)
    outputs = (spec("left", "FP32", -1, 3), spec("right", "FP32", -1, 3))
    gateway.serve_graph(manifest("pairs", numbers, outputs=outputs), of_numbers)
    body = {"model": "words/1", "input": "abc"} | values
    answer = await gateway.client.post("/v1/embeddings", json=body, headers=gateway.headers())
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert words in answer.json()["error"]["message"]


async def test_of_several_vectors_the_one_called_embedding_is_meant(gateway: Any) -> None:
    outputs = (spec("pooled", "FP32", -1, 3), spec("embedding", "FP32", -1, 1))
    gateway.serve_graph(
        manifest("both", spec("x", "FP32", -1, 3), outputs=outputs),
        lambda arrays: {"pooled": arrays["x"], "embedding": arrays["x"][:, :1]},
    )
    body = {"model": "both/1", "input": [1, 2, 3]}
    answer = await gateway.client.post("/v1/embeddings", json=body, headers=gateway.headers())
    assert answer.json()["data"][0]["embedding"] == [1.0]


async def test_a_model_that_gives_no_finite_numbers_says_so(gateway: Any) -> None:
    gateway.serve_graph(
        manifest("broken-one", spec("x", "FP32", -1, 3)),
        lambda arrays: {"vector": arrays["x"] * np.float32(np.nan)},
    )
    body = {"model": "broken-one/1", "input": [1, 2, 3]}
    answer = await gateway.client.post("/v1/embeddings", json=body, headers=gateway.headers())
    assert answer.status_code == 502
    assert "NaN" in answer.json()["error"]["message"]
