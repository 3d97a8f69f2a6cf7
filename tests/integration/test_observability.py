"""What Prometheus sees of a running stack, by the configuration that is shipped."""

from __future__ import annotations

import json
import time
from pathlib import Path

import httpx
import pytest

from cluster.session.record import read_record
from tests.prometheus import prometheus_scraping
from tests.stack import Stack

pytestmark = pytest.mark.stack


def test_prometheus_finds_the_gateways_metrics_under_their_names(
    stack: Stack, tmp_path: Path
) -> None:
    headers = {"Authorization": f"Bearer {stack.key}"}
    for _ in range(3):
        assert httpx.get(f"{stack.settings.gateway_url}/v1/models", headers=headers).is_success
    with prometheus_scraping(stack.settings.metrics_port, tmp_path) as prometheus:
        (counted,) = prometheus.wait_for(
            'sum(heliostat_requests_total{route="/v1/models", status="200"}) >= 3'
        )
        (buckets,) = prometheus.query(
            'sum(heliostat_request_duration_seconds_bucket{route="/v1/models", le="+Inf"})'
        )
        assert float(buckets["value"][1]) >= float(counted["value"][1])


def test_metrics_are_not_to_be_had_through_the_gateway(stack: Stack) -> None:
    headers = {"Authorization": f"Bearer {stack.key}"}
    for path in ("/metrics", "/metrics/", "/-/metrics", "/v1/metrics"):
        url = stack.settings.gateway_url + path
        assert httpx.get(url).status_code == 401
        answer = httpx.get(url, headers=headers)
        assert answer.status_code == 404
        assert "heliostat_requests" not in answer.text


def test_the_access_line_is_written_at_once_and_is_json(stack: Stack) -> None:
    """Serve holds back a thousand lines of what it takes for its own, and adds words to them."""
    headers = {"Authorization": f"Bearer {stack.key}", "x-request-id": "found-in-the-log"}
    url = f"{stack.settings.gateway_url}/v1/models"
    assert httpx.get(url, headers=headers).headers.get_list("x-request-id") == ["found-in-the-log"]
    scratch_dir = read_record(stack.settings.home).scratch_dir
    assert scratch_dir is not None
    logs = scratch_dir / "ray" / "session_latest" / "logs"
    deadline_s = time.monotonic() + 10
    while not (lines := _lines_with("found-in-the-log", logs)):
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    fields = json.loads(lines[0])
    assert (fields["route"], fields["status"]) == ("/v1/models", 200)
    assert stack.key not in lines[0]


def test_an_odd_request_id_is_replaced_everywhere(stack: Stack) -> None:
    headers = {"Authorization": f"Bearer {stack.key}", "x-request-id": "an odd one"}
    answer = httpx.get(f"{stack.settings.gateway_url}/v1/models", headers=headers)
    (request_id,) = answer.headers.get_list("x-request-id")
    assert " " not in request_id


def _lines_with(text: str, directory: Path) -> list[str]:
    lines = [
        line
        for path in directory.glob("worker-*.err")
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines()
    ]
    return [line for line in lines if text in line]
