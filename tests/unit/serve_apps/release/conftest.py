"""A controller with real tables for each test."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.database import open_database
from tests.release_world import World


@pytest.fixture
def world(tmp_path: Path, empty_database: Path) -> Iterator[World]:
    shutil.copy(empty_database, tmp_path / "heliostat.db")
    world = World(tmp_path)
    yield world
    world.engine.dispose()
    open_database.cache_clear()
