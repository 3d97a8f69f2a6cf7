"""What Prometheus sees of a running stack, by the configuration that is shipped."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

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
