"""The Grafana board asks only for what a gateway exports, and a real Prometheus answers it all."""

from __future__ import annotations

import asyncio
import json
import math
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, Gauge, generate_latest

from cluster.observability.metrics import MetricsExport
from cluster.settings import Settings
from tests.prometheus import CONFIG, ROOT, SHIPPED_TARGET, prometheus_scraping

GRAFANA = ROOT / "infra" / "grafana"
BOARD = json.loads((GRAFANA / "dashboards" / "heliostat.json").read_text(encoding="utf-8"))
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
TARGETS = [(panel["title"], target) for panel in PANELS for target in panel["targets"]]
VARIABLES = [v["definition"] for v in BOARD["templating"]["list"] if v["type"] == "query"]
ANNOTATIONS = [annotation["expr"] for annotation in BOARD["annotations"]["list"]]
QUERIES = [target["expr"] for _, target in TARGETS] + VARIABLES + ANNOTATIONS
# Added by Ray and by Prometheus itself.
THEIR_LABELS = {"WorkerId", "instance", "job"}


def names_in(query: str) -> set[str]:
    return set(re.findall(r"\b(?:ray_)?heliostat_\w+", query))


def labels_in(query: str) -> set[str]:
    grouped = re.findall(r"\bby \(([^)]*)\)", query)
    labels = {label.strip() for group in grouped for label in group.split(",")}
    labels |= set(re.findall(r'(\w+)\s*(?:=~|!~|!=|=)\s*"', query))
    return labels | set(re.findall(r"label_values\(.*, (\w+)\)$", query))


class RayLikeAgent:
    """Exports as Ray's metrics agent does: gauges, its own prefix, the worker's label."""

    def __init__(self, exported: CollectorRegistry) -> None:
        self._registry = CollectorRegistry()
        self.export = MetricsExport(exported, self._make)

    def _make(self, name: str, documentation: str, labels: tuple[str, ...]) -> Any:
        gauge = Gauge(f"ray_{name}", documentation, (*labels, "WorkerId"), registry=self._registry)

        class Set:
            def set(self, value: float, tags: dict[str, str]) -> None:
                gauge.labels(**tags, WorkerId="w1").set(value)

        return Set()

    def text(self) -> bytes:
        self.export.flush()
        return generate_latest(self._registry)


async def traffic(gateway: Any) -> None:
    """Something of everything that is counted."""
    headers = gateway.headers("infer")
    pixels = {"name": "pixels", "datatype": "FP32", "shape": [1, 4], "data": [0, 0, 0, 0]}
    prompt = {"model": "talker", "prompt": "the sun", "max_tokens": 6}
    gateway.break_next_stream(2)
    many = pixels | {"shape": [64, 4], "data": [0] * 256}
    mute = prompt | {"model": "mute", "max_tokens": 1}
    bodies = [
        ("/v2/models/classes/infer", {"inputs": [pixels]}),
        *[("/v2/models/classes/infer", {"inputs": [many]})] * 4,
        ("/v1/completions", prompt | {"stream": True}),
        ("/v1/completions", prompt | {"model": "nobody"}),
        *[("/v1/completions", mute)] * 6,  # of which it sheds some
    ]
    await asyncio.gather(
        *(gateway.client.post(path, json=body, headers=headers) for path, body in bodies)
    )
    # Some of these customers have the canary, which fails; the others are mirrored to it.
    for number in range(12):
        session = {**headers, "x-session-id": str(number)}
        await gateway.client.post(bodies[0][0], json=bodies[0][1], headers=session)
    await asyncio.to_thread(gateway.drift.flush)


def crash(_arrays: Any) -> Any:
    raise RuntimeError("boom")


async def test_every_metric_and_label_of_the_board_is_exported_and_every_metric_is_on_it(
    gateway: Any, trial: Any
) -> None:
    await trial.graph(crash, weight=0.5, mirrored=1.0)
    await traffic(gateway)
    await trial.until_mirrored("classes/3")
    registry = gateway.telemetry.instruments.registry
    exported: dict[str, set[str]] = {}
    for family in registry.collect():
        for sample in family.samples:
            exported.setdefault(sample.name, set()).update(sample.labels)
    asked: set[str] = set()
    for query in QUERIES:
        names = names_in(query)
        assert names, query
        assert names <= exported.keys(), f"not exported: {names - exported.keys()}"
        known = set.intersection(*(exported[name] for name in names)) | THEIR_LABELS
        assert labels_in(query) <= known, f"{query}: {labels_in(query) - known}"
        asked |= names
    families = [family.name for family in registry.collect()]
    forgotten = [name for name in families if not any(found.startswith(name) for found in asked)]
    assert not forgotten, "on no panel"


@pytest.mark.parametrize(("title", "target"), TARGETS, ids=lambda value: str(value)[:20])
def test_a_legend_names_labels_that_its_query_keeps(title: str, target: dict[str, str]) -> None:
    shown = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
    kept = re.findall(r"\bby \(([^)]*)\)", target["expr"])
    for group in kept:
        assert shown == {label.strip() for label in group.split(",")} - {"le"}, title


@pytest.fixture
def agent(gateway: Any) -> Iterator[int]:
    """The port on which the gateway's metrics can be scraped as from Ray's agent."""
    exporting = RayLikeAgent(gateway.telemetry.instruments.registry)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(exporting.text())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


async def test_a_real_prometheus_answers_every_query(
    gateway: Any, trial: Any, agent: int, tmp_path: Path
) -> None:
    def in_ten_seconds(query: str) -> str:
        for variable, value in (
            ("$__rate_interval", "10s"), ("$model", ".*"), ("$version", ".*"),
        ):  # fmt: skip
            query = query.replace(variable, value)
        return query

    await trial.graph(crash, weight=0.5, mirrored=1.0)
    await traffic(gateway)
    await trial.until_mirrored("classes/3")
    with prometheus_scraping(agent, tmp_path) as prometheus:
        await asyncio.to_thread(prometheus.wait_for, "heliostat_requests_total")
        await traffic(gateway)  # rates need two scrapes with a difference
        grown = "min(sum by (model) (rate(heliostat_model_requests_total[10s]))) > 0"
        await asyncio.to_thread(prometheus.wait_for, grown)
        for title, target in TARGETS:
            samples = prometheus.query(in_ten_seconds(target["expr"]))
            values = [float(sample["value"][1]) for sample in samples]
            assert any(map(math.isfinite, values)), f"{title}: {target['expr']} gives {samples}"
        entered, left = (prometheus.query(in_ten_seconds(query)) for query in ANNOTATIONS)
        assert {"model": "classes", "version": "3", "state": "canary"} in [
            sample["metric"] for sample in entered
        ]
        assert left == []


def test_what_is_provisioned_fits_together() -> None:
    assert f"127.0.0.1:{Settings.model_fields['metrics_port'].default}" == SHIPPED_TARGET
    scraped = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["global"]["scrape_interval"]
    source = yaml.safe_load((GRAFANA / "provisioning/datasources/heliostat.yaml").read_text())
    assert source["datasources"][0]["jsonData"]["timeInterval"] == scraped
    provider = yaml.safe_load((GRAFANA / "provisioning/dashboards/heliostat.yaml").read_text())
    assert provider["providers"][0]["options"]["path"] == "$HELIOSTAT_DASHBOARDS"
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert len(ids) == len(set(ids))
