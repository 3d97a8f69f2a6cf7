from pathlib import Path

import pytest

from cluster.errors import ConfigError
from cluster.session.environment import client_environment, stack_environment
from cluster.session.processes import PART_VARIABLE, STACK_VARIABLE
from cluster.settings import (
    Settings,
    changed_settings,
    load_settings,
    load_settings_file,
    store_settings,
)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    (tmp_path / "keys").mkdir()
    settings = Settings(home=tmp_path, gateway_port=8123, replica_port_min=31000)
    settings.api_key_path.write_text("hst_secret")
    settings.ray_token_path.write_text("token")
    return settings


def test_a_users_shell_does_not_mislead_the_servers(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in client_environment(settings).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HELIOSTAT_GATEWAY_PORT", "1234")
    environment = stack_environment(settings)
    assert not {"RAY_ADDRESS", "RAY_AUTH_TOKEN", "OPENAI_API_KEY", "HELIOSTAT_GATEWAY_PORT"} & set(
        environment
    )
    assert environment["HELIOSTAT_HOME"] == str(settings.home)


def test_the_client_environment_marks_no_process_as_ours(settings: Settings) -> None:
    assert not {STACK_VARIABLE, PART_VARIABLE} & set(client_environment(settings))


def test_two_homes_share_no_path_and_no_replica_port(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    one = stack_environment(Settings(home=tmp_path / "one"))
    two = stack_environment(Settings(home=tmp_path / "two", replica_port_min=32000))
    shared = {name for name in one if one[name] == two.get(name)}
    own = {
        "RAY_AUTH_TOKEN_PATH", "RAY_TMPDIR", "TMPDIR", "TORCH_EXTENSIONS_DIR",
        "RAY_SERVE_HAPROXY_BINARY_PATH", "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC",
        "RAY_SERVE_HAPROXY_SOCKET_PATH", "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH",
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE", "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT",
    }  # fmt: skip
    assert own <= set(one)
    assert not own & shared


def test_stored_settings_are_found_by_every_later_process(settings: Settings) -> None:
    store_settings(settings)
    assert load_settings(home=settings.home).gateway_port == 8123
    assert changed_settings(settings) == []
    moved = Settings(home=settings.home, gateway_port=8124)
    assert changed_settings(moved) == ["gateway_port"]


def test_a_shell_that_evaluated_env_asks_for_no_other_settings(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    store_settings(settings)
    for name, value in client_environment(settings).items():
        monkeypatch.setenv(name, value)
    assert changed_settings(load_settings()) == []


def test_a_settings_file_yields_to_variables_and_names_its_mistakes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HELIOSTAT_HOME", str(tmp_path))
    monkeypatch.setenv("HELIOSTAT_MLFLOW_PORT", "5005")
    path = tmp_path / "local.yaml"
    path.write_text("mlflow_port: 5001\ngateway_port: 8001\n")
    settings = load_settings_file(path)
    assert (settings.mlflow_port, settings.gateway_port) == (5005, 8001)
    path.write_text("gateway_prt: 8001\n")
    with pytest.raises(ConfigError, match="gateway_port"):
        load_settings_file(path)
