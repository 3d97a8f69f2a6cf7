"""Real parts shared by the unit tests of the ground floor."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.settings import Settings
from tests.servers import free_port, start_server, stop_server


@pytest.fixture(scope="session")
def mlflow_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the MLflow server keeps its database and its artifacts."""
    return tmp_path_factory.mktemp("mlflow")


@pytest.fixture(scope="session")
def mlflow_port(mlflow_home: Path) -> Iterator[int]:
    """Port of a real MLflow server with an empty database."""
    home = mlflow_home
    port = free_port()
    command = [
        str(Path(sys.executable).parent / "mlflow"),
        "server",
        "--host=127.0.0.1",
        f"--port={port}",
        "--workers=1",
        f"--backend-store-uri=sqlite:///{home / 'mlflow.db'}",
        f"--artifacts-destination={home / 'artifacts'}",
    ]
    process = start_server(
        command,
        f"http://127.0.0.1:{port}/health",
        home / "server.log",
        MLFLOW_DISABLE_TELEMETRY="true",
        MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false",
    )
    yield port
    stop_server(process)


@pytest.fixture
def settings(tmp_path: Path, mlflow_port: int) -> Settings:
    """A home directory of its own, beside the shared MLflow server."""
    return Settings(home=tmp_path / "home", mlflow_port=mlflow_port)


@pytest.fixture
def settings_without_server(settings: Settings) -> Settings:
    """The same home with nothing listening where MLflow should be."""
    return Settings(home=settings.home, mlflow_port=free_port())


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory that holds at most 128 KiB: a disk of its own where mounting one is permitted."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "none", str(directory)]
    if shutil.which("mount") and not subprocess.run(mount, capture_output=True).returncode:
        yield directory
        subprocess.run(["umount", str(directory)], check=True)
        return
    copy = shutil.copyfile

    def copy_until_full(source: Path, target: Path, **options: bool) -> None:
        if Path(target).is_relative_to(directory) and Path(source).stat().st_size > 128 * 1024:
            Path(target).write_bytes(b"partial")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        copy(source, target, **options)

    monkeypatch.setattr(shutil, "copyfile", copy_until_full)
    yield directory
