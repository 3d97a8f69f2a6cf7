"""Compressed bodies: understood in two ways, bounded in what they unpack to, whole or refused."""

from __future__ import annotations

import asyncio
import gzip
import json
import tracemalloc
import zlib
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton

LIMIT = 64 * 1024
PATHS = ("/v2/models/classes/infer", "/v1/models/classes:predict")
BODY = json.dumps({"instances": [[1.0] * 4]}).encode()


async def post(gateway: Any, content: Any, encoding: str, path: str = PATHS[1]) -> Any:
    headers = gateway.headers() | {"content-encoding": encoding}
    return await gateway.client.post(path, content=content, headers=headers)


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
async def test_the_client_may_compress(gateway: Any, http_address: str, algorithm: str) -> None:
    pixels = np.ones((100, 4), dtype=np.float32)

    def work() -> Any:
        sent = triton.InferInput("pixels", [100, 4], "FP32").set_data_from_numpy(pixels)
        with triton.InferenceServerClient(http_address) as client:
            return client.infer(
                "classes",
                [sent],
                headers=gateway.headers(),
                request_compression_algorithm=algorithm,
                response_compression_algorithm=algorithm,
            )

    assert (await asyncio.to_thread(work)).as_numpy("logits").shape == (100, 3)


async def test_a_body_may_come_in_pieces(gateway: Any) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for byte in gzip.compress(BODY):
            yield bytes([byte])

    answer = await post(gateway, pieces(), "gzip")
    assert answer.json()["predictions"][0]["label"] == "bright"
    assert (await post(gateway, BODY, "identity")).status_code == 200


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress])
async def test_what_unpacks_to_too_much_is_refused_before_it_is_there(
    gateway: Any, pack: Any
) -> None:
    bomb = pack(b" " * 50_000_000)
    assert len(bomb) < LIMIT
    headers = gateway.headers()  # made before memory is watched
    encoding = "gzip" if pack is gzip.compress else "deflate"
    tracemalloc.start()
    try:
        answer = await gateway.client.post(
            PATHS[0], content=bomb, headers=headers | {"content-encoding": encoding}
        )
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert answer.status_code == 413
    assert f"unpacks to more than {LIMIT} bytes" in answer.json()["error"]
    assert peak_bytes < 10_000_000


@pytest.mark.parametrize("path", [*PATHS, "/v1/completions", "/admin/deployments"])
@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "gzip\t;", "x" * 5000])
async def test_other_encodings_are_refused_by_name(gateway: Any, path: str, encoding: str) -> None:
    answer = await post(gateway, BODY, encoding, path)
    assert answer.status_code == 415, answer.text
    assert f"Content-Encoding '{encoding:.100}'" in answer.text.replace("\\t", "\t")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "ends before the end"),
        (BODY, "is no such data"),
        (gzip.compress(BODY)[:-1], "ends before the end"),
        (gzip.compress(BODY) + b"_", "goes on after the end"),
        (zlib.compress(BODY), "is no such data"),
        (gzip.compress(BODY)[:-8] + b"\0" * 8, "is no such data"),
    ],
)
async def test_a_body_must_be_what_its_encoding_says(
    gateway: Any, content: bytes, words: str
) -> None:
    answer = await post(gateway, content, "gzip")
    assert answer.status_code == 400, answer.text
    assert words in answer.json()["error"]
