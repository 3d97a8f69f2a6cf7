import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.errors import ConfigError, PortInUseError
from cluster.session.ports import PORTS, check_ports_are_free, check_ports_differ, is_free
from cluster.settings import Settings


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken


def test_a_taken_port_is_named_with_its_holder_and_the_setting(
    listener: socket.socket, tmp_path: Path
) -> None:
    port = listener.getsockname()[1]
    settings = Settings(home=tmp_path, mlflow_port=port)
    with pytest.raises(PortInUseError) as caught:
        check_ports_are_free(settings, ["mlflow"])
    message = str(caught.value)
    assert f"port {port}" in message
    assert f"pid {os.getpid()}" in message
    assert "HELIOSTAT_MLFLOW_PORT" in message


def test_a_port_is_free_again_when_its_holder_closed_it(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    assert not is_free(port)
    listener.close()
    assert is_free(port)


def test_a_holder_that_is_about_to_end_is_waited_for(
    listener: socket.socket, tmp_path: Path
) -> None:
    settings = Settings(home=tmp_path, mlflow_port=listener.getsockname()[1])
    threading.Timer(0.3, listener.close).start()
    check_ports_are_free(settings, ["mlflow"], patience_s=30)


def test_a_closed_connection_that_lingers_does_not_hold_its_port(listener: socket.socket) -> None:
    with socket.create_connection(listener.getsockname()) as client:
        server, _ = listener.accept()
        port = listener.getsockname()[1]
        server.close()  # the side that closes first lingers
        listener.close()
        assert client.recv(1) == b""
    assert is_free(port)


def test_two_settings_may_not_name_one_port(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gateway_port.*mlflow_port|mlflow_port.*gateway_port"):
        check_ports_differ(Settings(home=tmp_path, gateway_port=7000, mlflow_port=7000))


def test_a_port_may_not_lie_among_the_replicas(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="30000-30999"):
        check_ports_differ(Settings(home=tmp_path, gateway_port=30500))


def test_every_part_names_settings_that_exist() -> None:
    names = [name for names in PORTS.values() for name in names]
    assert set(names) <= set(Settings.model_fields)
    check_ports_differ(Settings())
