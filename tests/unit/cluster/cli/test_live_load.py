"""The demo's load tells apart what customers got: answers, wrong ones, refusals, broken calls."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.cli.live_load import LiveLoad
from cluster.settings import Settings

ROWS = np.arange(4, dtype=np.float32).reshape(4, 1)


class Gateway(BaseHTTPRequestHandler):
    """Labels 0 as 0 and everything else as 1; refuses 3; `customers` are those who came."""

    protocol_version = "HTTP/1.1"
    customers: set[str]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        (value,) = body["inputs"][0]["data"]
        self.customers.add(self.headers["x-session-id"])
        status = 503 if value == 3 else 200
        answer: Any = {"outputs": [{"name": "label", "data": [str(int(value > 0))]}]}
        if status != 200:
            answer = {"error": "no room"}
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("x-model-version", "m/1" if value < 2 else "m/2")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Settings]:
    Gateway.customers = set()
    with ThreadingHTTPServer(("127.0.0.1", 0), Gateway) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        settings = Settings(home=tmp_path, gateway_port=server.server_port)
        settings.api_key_path.parent.mkdir(parents=True, exist_ok=True)
        settings.api_key_path.write_text("hst_key\n")
        yield settings
        server.shutdown()


def test_every_request_is_counted_by_what_came_of_it(gateway: Settings) -> None:
    load = LiveLoad(gateway, "m", ROWS, ["0", "1", "2", "3"], num_customers=8, requests_per_s=400)
    with load:
        while load.seen.num_requests < 80:
            time.sleep(0.01)
    seen = load.seen
    answered = sum(seen.by_version.values())
    assert seen.num_requests == answered + seen.num_failed
    assert set(seen.by_version) == {"m/1", "m/2"}
    assert seen.wrong_by_version["m/1"] == 0
    assert seen.wrong_by_version["m/2"] == seen.by_version["m/2"]
    assert seen.num_failed >= 15
    assert seen.failures[0].startswith("503 from m/2: ")
    assert 0 < seen.quantile_ms(0.5) <= seen.quantile_ms(0.99)
    assert Gateway.customers == {f"customer-{number}" for number in range(8)}


def test_a_gateway_that_is_away_is_a_failure_and_not_an_error(gateway: Settings) -> None:
    away = gateway.model_copy(update={"gateway_port": 1})
    with LiveLoad(away, "m", ROWS, ["0"] * 4, requests_per_s=400) as load:
        while load.seen.num_requests < 8:
            time.sleep(0.01)
    assert load.seen.num_failed == load.seen.num_requests
    assert load.seen.quantile_ms(0.5) > 0
    assert "ConnectError" in load.seen.failures[0]
