from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.errors import StartError
from cluster.session import serving
from cluster.settings import Settings

_OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}"
_REFUSED = b"HTTP/1.1 400 No\r\ncontent-length: 9\r\nconnection: close\r\n\r\nno such x"


class Dashboard:
    """Gives each connection the next answer; an empty one hangs up."""

    def __init__(self, *answers: bytes) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self.num_left = len(answers)
        self._thread = threading.Thread(target=self._run, args=(answers,), daemon=True)
        self._thread.start()

    def _run(self, answers: tuple[bytes, ...]) -> None:
        for answer in answers:
            client, _ = self._server.accept()
            with client:
                client.recv(65536)
                client.sendall(answer)
            self.num_left -= 1

    def close(self) -> None:
        self._thread.join(5)
        self._server.close()


@pytest.fixture
def settings(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Settings]:
    dashboard = Dashboard(*request.param)
    found = Settings(home=tmp_path, dashboard_port=dashboard.port)
    found.ray_token_path.parent.mkdir(parents=True, exist_ok=True)
    found.ray_token_path.write_text("token")
    monkeypatch.setattr(serving, "_RETRY_INTERVAL_S", 0.01)
    yield found
    dashboard.close()
    assert dashboard.num_left == 0


@pytest.mark.parametrize("settings", [(b"", b"", b"", _OK)], indirect=True)
def test_a_dashboard_that_drops_calls_while_serve_starts_is_asked_again(settings: Settings) -> None:
    # The first asks for states, and takes silence as none.
    serving.deploy(settings)


@pytest.mark.parametrize("settings", [(_OK, _REFUSED)], indirect=True)
def test_a_refusal_is_final(settings: Settings) -> None:
    with pytest.raises(StartError, match="refused the applications: no such x"):
        serving.deploy(settings)
