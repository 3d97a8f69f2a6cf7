"""What tests of every kind share: an environment without leftovers, an S3 server, the local stack.

A test that asks for `stack` gets the one stack of the session, started by the real command on its
own home and ports, so that a developer's own stack may run beside it.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cluster.settings import Settings
from tests.servers import free_port, start_server, stop_server
from tests.stack import Stack, new_stack
from tests.tiny_models import save_llama

if TYPE_CHECKING:
    from tests.live_releases import Releases


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what each directory of tests costs; set-up of what tests share counts where it ran."""
    seconds: dict[str, float] = defaultdict(float)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[str(Path(report.nodeid.split("::")[0]).parent)] += report.duration
    terminalreporter.section("minutes per directory")
    for directory, total in sorted(seconds.items()):
        terminalreporter.write_line(f"{total / 60:6.2f}  {directory}")


@pytest.fixture(scope="session", autouse=True)
def nothing_from_the_shell() -> Iterator[None]:
    """Tests do not see what `eval "$(heliostat env)"` left in the developer's shell."""
    names = {f"HELIOSTAT_{name.upper()}" for name in Settings.model_fields}
    names |= {"RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "MLFLOW_TRACKING_URI"}
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="session")
def short_dir() -> Iterator[Path]:
    """A directory with a short name: Unix sockets lie in it."""
    path = Path(tempfile.mkdtemp(prefix="hst"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def stack(short_dir: Path) -> Iterator[Stack]:
    """The running stack that all tests of the session share."""
    started = new_stack(short_dir)
    try:
        up = started.up()
        assert up.returncode == 0, up.stderr
        yield started
    finally:
        down = started.run_cli("down")
        assert down.returncode == 0, down.stderr


@pytest.fixture(scope="module")
def releases(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Releases]:
    """A served model, and versions of it to release."""
    from tests.live_releases import NAME, Releases  # with all that makes models

    found = Releases(stack, tmp_path_factory.mktemp("versions"))
    found.begin()
    yield found
    found.admin.undeploy(NAME, None)


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
def language_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory with random weights, to import as one's own model."""
    return save_llama(tmp_path_factory.mktemp("language_model"), "Once upon a time")
