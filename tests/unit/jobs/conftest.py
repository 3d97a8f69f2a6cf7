"""What the tests of the jobs floor share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# A shared machine has no deadlines.
settings.register_profile(
    "jobs", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)


@pytest.fixture(autouse=True, scope="package")
def _hypothesis_profile() -> Iterator[None]:
    settings.load_profile("jobs")
    yield
    settings.load_profile("default")
