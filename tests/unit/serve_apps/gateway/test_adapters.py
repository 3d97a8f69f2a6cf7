"""An adapter that shares its base: its own name, limits and bill; its base's replicas."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from cluster.model_package.manifest import AdapterInfo
from cluster.processing.text import TextProcessor
from serve_apps.gateway.catalogue import ServedModel
from serve_apps.gateway.routing_table import ServedVersion
from serve_apps.llm.engine import EngineRequest
from serve_apps.options import DeploymentOptions
from tests.unit.serve_apps.conftest import DIGEST, text_manifest

ADAPTER = "sha256:" + "a" * 64
BODY = {"prompt": "abc", "temperature": 0, "max_tokens": 6}


@pytest.fixture
def helper(gateway: Any, models_dir: Path) -> ServedVersion:
    """helper/1, an adapter of talker/1, which alone has replicas."""
    text = TextProcessor.load(models_dir / "talker")
    served = ServedVersion(
        "helper", 1, ADAPTER, "helper.v1", options=DeploymentOptions(shares_base=True)
    )
    manifest = text_manifest(text.vocab_size).model_copy(
        update={"kind": "adapter", "name": "helper", "adapter": AdapterInfo(base_digest=DIGEST)}
    )
    gateway.graphs["helper"] = ServedModel(served, manifest, text)
    gateway.served["helper", 1] = served
    return served


async def ask(gateway: Any, model: str, **changes: Any) -> Any:
    body = {"model": model} | BODY | changes
    return await gateway.client.post("/v1/completions", json=body, headers=gateway.headers())


async def test_its_base_answers_under_its_name(gateway: Any, helper: ServedVersion) -> None:
    gateway.engine.load_adapter(ADAPTER, Path())
    answer = await ask(gateway, "helper/1")
    assert answer.json()["choices"][0]["text"] == "cbacba"
    assert answer.headers["x-model-version"] == "helper/1"
    assert (await ask(gateway, "talker")).json()["choices"][0]["text"] == "abcabc"
    headers, billed = gateway.headers("infer"), set()
    for _ in range(100):
        usage = await gateway.client.get("/v1/usage", headers=headers)
        billed = {row["model"] for row in usage.json()["data"]}
        if len(billed) == 2:
            break
        await asyncio.sleep(0.05)
    assert billed == {"helper", "talker"}


async def test_an_adapter_that_its_base_cannot_take_is_the_callers_to_know(
    gateway: Any, helper: ServedVersion
) -> None:
    answer = await ask(gateway, "helper/1")
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert (error["param"], f"adapter {ADAPTER} is not loaded" in error["message"]) == (
        "model",
        True,
    )
    assert (await ask(gateway, "talker")).status_code == 200


async def test_releases_of_adapters_are_told_from_each_other_and_from_their_base(
    gateway: Any, helper: ServedVersion, trial: Any
) -> None:
    other = "sha256:" + "c" * 64
    await gateway.route(weights={**gateway.routes.weights, "helper": {1: 1.0}})
    await trial.begin("helper", 1, 2, mirrored=1.0, digest=other, shares_base=True)
    gateway.engine.load_adapter(ADAPTER, Path())
    gateway.engine.load_adapter(other, Path())
    assert (await ask(gateway, "helper")).headers["x-model-version"] == "helper/1"
    await trial.until_mirrored("helper/2")
    assert trial.seen("helper/2", "pair", "token_disagreement") == (1, 0)
    await ask(gateway, "talker")
    assert trial.seen("helper/2", "champion", "errors") == (1, 0)


async def test_an_adapter_that_cannot_be_reached_is_a_canary_that_fails(
    gateway: Any, helper: ServedVersion, trial: Any
) -> None:
    gateway.engine.load_adapter(ADAPTER, Path())
    other = "sha256:" + "c" * 64
    await trial.begin("helper", 1, 2, weight=1.0, digest=other, shares_base=True)
    answer = await ask(gateway, "helper")
    assert (answer.status_code, answer.headers["x-model-version"]) == (200, "helper/1")
    assert trial.seen("helper/2", "candidate", "errors") == (1, 1)


async def test_without_its_base_it_says_what_is_missing(
    gateway: Any, helper: ServedVersion
) -> None:
    for key, served in gateway.served.items():
        if served.digest == DIGEST:
            gateway.served[key] = dataclasses.replace(served, digest="sha256:" + "b" * 64)
    answer = await ask(gateway, "helper/1")
    assert answer.status_code == 502
    assert "the base of adapter helper/1 is not served" in answer.json()["error"]["message"]


async def test_its_streams_drain_as_those_of_its_base_do(
    gateway: Any, helper: ServedVersion
) -> None:
    gateway.engine.load_adapter(ADAPTER, Path())
    base = gateway.served["talker", 1]
    gateway.served["talker", 1] = dataclasses.replace(base, options=DeploymentOptions(drain_s=7))
    generate, given = gateway.backend.generate, list[float]()

    def remembering(application: str, request: EngineRequest, *, drain_s: float) -> Any:
        given.append(drain_s)
        return generate(application, request, drain_s=drain_s)

    gateway.backend.generate = remembering
    assert (await ask(gateway, "helper/1")).status_code == 200
    assert given == [7]
