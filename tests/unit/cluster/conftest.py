"""Real parts shared by the unit tests of the ground floor: an S3 server and an MLflow server."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.settings import Settings


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def start_server(
    command: list[str], url: str, log: Path, **environment: str
) -> subprocess.Popen[bytes]:
    """Start a child in its own process group and wait until it answers at `url`."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        )
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=2):
                return process
        except OSError:
            if process.poll() is not None:
                break
            time.sleep(0.1)
    stop_server(process)
    raise RuntimeError(f"{command[0]} did not start: {log.read_text()[-2000:]}")


def stop_server(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, 15)
        process.wait(10)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        process.kill()


@pytest.fixture(scope="session")
def s3_root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Root of a bucket on a local S3 server, as `Storage.open` takes it."""
    port = free_port()
    command = [str(Path(sys.executable).parent / "moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    log = tmp_path_factory.mktemp("s3") / "server.log"
    process = start_server(command, f"http://127.0.0.1:{port}/moto-api/", log)
    request = urllib.request.Request(f"http://127.0.0.1:{port}/bucket", method="PUT")
    request.add_header(
        "Authorization", "AWS4-HMAC-SHA256 Credential=test/20200101/us-east-1/s3/aws4_request"
    )
    with urllib.request.urlopen(request, timeout=10):
        pass
    yield (
        f"s3://test:test@bucket/root?region=us-east-1&scheme=http"
        f"&endpoint_override=127.0.0.1%3A{port}"
    )
    stop_server(process)


@pytest.fixture(scope="session")
def mlflow_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Port of a real MLflow server with an empty database."""
    home = tmp_path_factory.mktemp("mlflow")
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
