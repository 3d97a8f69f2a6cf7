"""Tests that need a long background program: started first, judged last.

What `dev_life` gives takes minutes of waiting, so it happens beside all other tests, and those
that ask for it come last. Nothing is started where no selected test asks for it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import dev_life as program
import pytest
from background import BackgroundProgram
from terraform_runner import reason_to_skip

_FIXTURE = "dev_life"
_DIRECTORY = pytest.StashKey[Path]()
_PROGRAM = pytest.StashKey[BackgroundProgram]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_waits)


def pytest_collection_finish(session: pytest.Session) -> None:
    config = session.config
    if config.option.collectonly or not any(map(_waits, session.items)) or reason_to_skip():
        return
    directory = tempfile.TemporaryDirectory(prefix="heliostat-dev-", ignore_cleanup_errors=True)
    config.add_cleanup(directory.cleanup)
    config.stash[_DIRECTORY] = Path(directory.name)
    config.stash[_PROGRAM] = program.start(Path(directory.name))
    config.add_cleanup(config.stash[_PROGRAM].end)  # runs first, and however the session ends


@pytest.fixture(scope="session")
def dev_life(pytestconfig: pytest.Config) -> program.Life:
    """The dev environment, applied and destroyed in the background."""
    if reason := reason_to_skip():
        pytest.skip(reason)
    pytestconfig.stash[_PROGRAM].wait(program.DEADLINE_S)
    return program.Life.read(pytestconfig.stash[_DIRECTORY])


def _waits(item: pytest.Item) -> bool:
    return _FIXTURE in getattr(item, "fixturenames", ())
