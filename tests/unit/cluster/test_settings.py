import json
from pathlib import Path

import pytest

from cluster.errors import ConfigError
from cluster.settings import SETTINGS_FILE, load_settings


@pytest.fixture(autouse=True)
def no_settings_outside_the_test(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import os

    for name in os.environ:
        if name.startswith("HELIOSTAT_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def test_state_lies_in_the_current_directory_by_default(tmp_path: Path) -> None:
    assert load_settings().home == tmp_path / ".heliostat"


def test_a_variable_wins_over_the_stored_file_and_that_over_the_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / SETTINGS_FILE).write_text(json.dumps({"gateway_port": 8100, "grpc_port": 9100}))
    monkeypatch.setenv("HELIOSTAT_HOME", str(home))
    monkeypatch.setenv("HELIOSTAT_GRPC_PORT", "9200")
    settings = load_settings()
    assert (settings.gateway_port, settings.grpc_port, settings.mlflow_port) == (8100, 9200, 5000)


def test_a_wrong_value_is_one_line_naming_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELIOSTAT_GATEWAY_PORT", "many")
    with pytest.raises(ConfigError, match="HELIOSTAT_GATEWAY_PORT"):
        load_settings()


def test_a_broken_settings_file_is_named(tmp_path: Path) -> None:
    (tmp_path / ".heliostat").mkdir()
    (tmp_path / ".heliostat" / SETTINGS_FILE).write_text("{")
    with pytest.raises(ConfigError, match=SETTINGS_FILE):
        load_settings()


def test_one_url_moves_state_to_a_fleet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELIOSTAT_DATABASE_URL", "postgresql+psycopg://db/heliostat")
    monkeypatch.setenv("HELIOSTAT_STORAGE_URL", "s3://bucket/prefix")
    settings = load_settings()
    assert settings.database == "postgresql+psycopg://db/heliostat"
    assert settings.storage_root == "s3://bucket/prefix"


@pytest.mark.parametrize("home", [5, True, "nul\0byte"])
def test_a_home_that_is_no_path_is_one_line(home: object) -> None:
    with pytest.raises(ConfigError, match="home"):
        load_settings(home=home)


def test_a_wrong_stored_value_is_told_without_the_others(tmp_path: Path) -> None:
    stored = {"gateway_port": True, "database_url": "postgresql://me:secret@db/x"}
    (tmp_path / SETTINGS_FILE).write_text(json.dumps(stored))
    with pytest.raises(ConfigError, match="gateway_port") as caught:
        load_settings(home=tmp_path)
    assert "secret" not in str(caught.value)


def test_an_empty_variable_is_an_absent_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELIOSTAT_HOME", "")
    monkeypatch.setenv("HELIOSTAT_GATEWAY_PORT", "")
    settings = load_settings()
    assert settings.home.name == ".heliostat"
    assert settings.gateway_port == 8000


def test_the_home_of_nobody_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELIOSTAT_HOME", "~nobody-of-that-name/x")
    with pytest.raises(ConfigError, match="cannot be found"):
        load_settings()
