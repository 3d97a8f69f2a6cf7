"""The watch of a whole gateway: what is counted, what is not, and what it costs in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import numpy as np
import pytest

from cluster.database import open_database
from cluster.drift_counts import DriftStore
from cluster.errors import OverloadedError
from cluster.generation import Sampling
from cluster.model_package.manifest import Manifest
from cluster.statistics.drift import measure
from cluster.statistics.profile import (
    DISTRIBUTIONS,
    DataProfile,
    describe,
    describe_tokens,
)
from serve_apps.gateway import drift as drift_module
from serve_apps.gateway.catalogue import ServedModel
from serve_apps.gateway.drift import DriftWatch
from serve_apps.gateway.routing_table import Routes, ServedVersion
from serve_apps.gateway.telemetry.instruments import Instruments
from serve_apps.llm.engine import EngineRequest, TokenOutput
from tests.unit.serve_apps.conftest import DIGEST, classify, text_manifest


async def send(gateway: Any, rows: Any, path: str = "/v2/models/classes/infer") -> None:
    pixels = {
        "name": "pixels",
        "datatype": "FP32",
        "shape": list(rows.shape),
        "data": rows.reshape(-1).tolist(),
    }
    answer = await gateway.client.post(
        path, json={"inputs": [pixels]}, headers=gateway.headers("infer")
    )
    assert answer.status_code == 200, answer.text


def shown(gateway: Any, metric: str, side: str, feature: str, version: str = "2") -> float | None:
    labels = {"model": "classes", "version": version, "side": side, "feature": feature}
    value: float | None = gateway.telemetry.instruments.registry.get_sample_value(metric, labels)
    return value


async def test_requests_like_the_training_data_are_no_drift_and_others_are(gateway: Any) -> None:
    random = np.random.default_rng(1)
    for _ in range(8):
        await send(gateway, random.random((60, 4), dtype=np.float32))
    await asyncio.to_thread(gateway.drift.flush)
    assert (shown(gateway, "heliostat_drift_psi", "inputs", "pixels[0]") or 9) < 0.2
    assert (shown(gateway, "heliostat_drift_ks", "inputs", "pixels[0]") or 9) < 0.2
    for _ in range(8):
        await send(gateway, 0.9 + random.random((60, 4), dtype=np.float32) / 10)
    await asyncio.to_thread(gateway.drift.flush)
    assert (shown(gateway, "heliostat_drift_psi", "inputs", "pixels[0]") or 0) > 0.25
    assert (shown(gateway, "heliostat_drift_psi", "outputs", "label") or 0) > 0.25
    assert shown(gateway, "heliostat_drift_ks", "outputs", "label") is None
    assert shown(gateway, "heliostat_drift_psi", "inputs", "pixels[0]", "1") is None


async def test_what_replicas_count_is_recorded_by_version(gateway: Any) -> None:
    for path in ("/v2/models/classes/infer", "/v2/models/classes/versions/1/infer"):
        await send(gateway, np.ones((5, 4), dtype=np.float32), path)
    await asyncio.to_thread(gateway.drift.flush)
    store = DriftStore(open_database(gateway.database_url))
    for version in (1, 2):
        (window,) = store.windows("classes", version)
        assert window.rows == {"inputs": 5.0, "outputs": 5.0}
        assert window.counts["outputs"]["label"].tolist() == [5.0, 0.0, 0.0]
    assert store.windows("echo", 1) == [], "its package has no profile"


async def test_requests_that_fail_are_not_counted(gateway: Any) -> None:
    bad = {"name": "pixels", "datatype": "FP32", "shape": [1, 3], "data": [0, 0, 0]}
    answer = await gateway.client.post(
        "/v2/models/classes/infer", json={"inputs": [bad]}, headers=gateway.headers("infer")
    )
    assert answer.status_code == 400
    await asyncio.to_thread(gateway.drift.flush)
    assert DriftStore(open_database(gateway.database_url)).windows("classes", 2) == []


async def test_mirrored_requests_are_not_counted(gateway: Any, trial: Any) -> None:
    await trial.graph(classify, mirrored=1.0)
    await send(gateway, np.ones((5, 4), dtype=np.float32))
    await trial.until_mirrored("classes/3")
    await asyncio.to_thread(gateway.drift.flush)
    store = DriftStore(open_database(gateway.database_url))
    (window,) = store.windows("classes", 2)
    assert window.rows["inputs"] == 5.0
    assert store.windows("classes", 3) == []


async def test_what_is_no_number_is_an_error_and_no_drift(gateway: Any, trial: Any) -> None:
    def give_no_number(arrays: Any) -> Any:
        return {"logits": np.full((len(arrays["pixels"]), 3), np.nan, np.float32)}

    await trial.graph(give_no_number, weight=1.0)
    await send(gateway, np.ones((5, 4), dtype=np.float32))
    await asyncio.to_thread(gateway.drift.flush)
    assert trial.seen("classes/3", "candidate", "errors") == (1, 1)
    store = DriftStore(open_database(gateway.database_url))
    (window,) = store.windows("classes", 3)
    assert window.rows == {"inputs": 5.0, "outputs": 0.0}
    assert not window.counts["outputs"]["label"].any()
    (window,) = store.windows("classes", 2)
    assert window.rows == {"inputs": 5.0, "outputs": 5.0}, "which answered in its place"


def graph(profile: DataProfile | None) -> ServedModel:
    manifest = Manifest.model_validate(
        {
            "kind": "graph",
            "name": "g",
            "created_at": "",
            "files": {},
            "golden": {"inputs": {}, "outputs": {}},
            "profile": {DISTRIBUTIONS: profile.model_dump(mode="json")} if profile else {},
        }
    )
    return ServedModel(ServedVersion("g", 1, DIGEST, "g.v1"), manifest)


def test_a_flood_is_sampled_uniformly_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Any] = []
    profile = DataProfile(inputs=describe({"x": np.arange(4000.0)}))
    watch = DriftWatch(Instruments(), lambda *row: written.append(row))
    model = graph(profile)
    for value in range(4000):
        watch.count(model, {"x": np.array([float(value)])}, {})
    watched = watch._watched["g", 1]
    assert watched is not None
    assert len(watched.sample.calls) == drift_module._MAX_CALLS
    watch.flush()
    (_, name, version, counts) = written[0]
    assert (name, version, counts.rows["inputs"]) == ("g", 1, 256.0)
    assert measure(profile, counts)["inputs"]["x"].psi < 0.25, "early and late ones alike"
    watch.flush()
    assert len(written) == 1, "nothing new, nothing written"

    monkeypatch.setattr(drift_module, "_MAX_BYTES", 10_000)
    for _ in range(100):
        watch.count(model, {"x": np.zeros((64, 100))}, {})
    held = sum(call.num_bytes for call in watched.sample.calls)
    assert held <= 10_000


def test_large_requests_keep_their_first_rows_alone() -> None:
    watch = DriftWatch(Instruments())
    model = graph(DataProfile(inputs=describe({"x": np.arange(10.0)})))
    body = np.zeros((100_000, 1))
    watch.count(model, {"x": body}, {})
    watched = watch._watched["g", 1]
    assert watched is not None
    (kept,) = watched.sample.calls[0].inputs.values()
    assert kept.shape == (64, 1)
    assert kept.base is None


def test_versions_that_are_gone_are_forgotten() -> None:
    instruments = Instruments()
    watch = DriftWatch(instruments)
    watch.count(graph(DataProfile(inputs=describe({"x": np.arange(10.0)}))), {"x": np.zeros(9)}, {})
    watch.flush()
    watch.follow(Routes())
    instruments.keep_only([])
    assert not watch._watched
    labels = {"model": "g", "version": "1", "side": "inputs"}
    assert instruments.registry.get_sample_value("heliostat_drift_rows", labels) is None


async def test_prompts_and_answers_of_a_language_model() -> None:
    ids = np.arange(300)
    profile = DataProfile(
        inputs={**describe({"length": np.arange(1, 20)}), "tokens": describe_tokens(ids)},
        outputs={"tokens": describe_tokens(ids)},
    )
    written: list[Any] = []
    watch = DriftWatch(Instruments(), lambda *row: written.append(row[-1]))
    values = {DISTRIBUTIONS: profile.model_dump(mode="json")}
    manifest = text_manifest(vocab_size=300).model_copy(update={"profile": values})
    talker = ServedModel(ServedVersion("talker", 1, DIGEST, "talker.v1"), manifest)
    request = EngineRequest("r", (1, 2, 3), Sampling(max_tokens=4))
    passed = watch.stream(talker, request, two_messages())
    assert [output.token_ids async for output in passed] == [(4, 5), (6,)]
    broken = watch.stream(talker, request, two_messages())
    await anext(broken)
    await broken.aclose()
    with pytest.raises(OverloadedError):
        await anext(watch.stream(talker, request, refused()))
    watch.flush()
    (counts,) = written
    assert counts.rows == {"inputs": 2.0, "outputs": 2.0}
    assert counts.counts["inputs"]["length"].sum() == 2
    assert counts.counts["inputs"]["tokens"].sum() == 6
    assert counts.counts["outputs"]["tokens"].sum() == 5


async def refused() -> AsyncGenerator[TokenOutput, None]:
    raise OverloadedError("too many streams are open")
    yield TokenOutput("r")


async def two_messages() -> AsyncGenerator[TokenOutput, None]:
    yield TokenOutput("r", token_ids=(4, 5))
    yield TokenOutput("r", token_ids=(6,), finish_reason="stop")
