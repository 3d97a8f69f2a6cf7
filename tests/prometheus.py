"""A real Prometheus with the configuration that is shipped, for tests."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.servers import free_port, start_server, stop_server

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "infra" / "prometheus" / "prometheus.yml"
SHIPPED_TARGET = "127.0.0.1:8267"


@dataclass(frozen=True)
class Prometheus:
    url: str

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The samples of an instant query; an expression that it cannot parse fails the test."""
        answer = httpx.get(f"{self.url}/api/v1/query", params={"query": expression})
        assert answer.status_code == 200, f"{expression}: {answer.text}"
        samples: list[dict[str, Any]] = answer.json()["data"]["result"]
        return samples

    def wait_for(self, expression: str, timeout_s: float = 45) -> list[dict[str, Any]]:
        """As `query`, once it has an answer."""
        deadline_s = time.monotonic() + timeout_s
        while not (samples := self.query(expression)):
            assert time.monotonic() < deadline_s, f"nothing for {expression}"
            time.sleep(0.2)
        return samples


@contextmanager
def prometheus_scraping(port: int, directory: Path) -> Iterator[Prometheus]:
    """Prometheus with the shipped configuration, but this port, each second."""
    assert shutil.which("prometheus"), "there is no Prometheus: apt-get install prometheus"
    text = CONFIG.read_text(encoding="utf-8")
    assert SHIPPED_TARGET in text
    config = yaml.safe_load(text.replace(SHIPPED_TARGET, f"127.0.0.1:{port}"))
    config["global"]["scrape_interval"] = "1s"
    path = directory / "prometheus.yml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    own_port = free_port()
    command = [
        "prometheus",
        f"--config.file={path}",
        f"--storage.tsdb.path={directory / 'series'}",
        f"--web.listen-address=127.0.0.1:{own_port}",
    ]
    url = f"http://127.0.0.1:{own_port}"
    process = start_server(command, f"{url}/-/ready", directory / "prometheus.log")
    try:
        yield Prometheus(url)
    finally:
        stop_server(process)
