"""The long form of tests/unit/cluster/model_package/test_fuzzing.py: 10,000 other seeds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.package_fuzzing import PackageFuzzer

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]

V1 = Path(__file__).parents[1] / "contract/v1"
KINDS = ("graph", "language_model", "adapter")
CASES = 10_000


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_packages_are_refused_or_are_the_same_package(kind: str, tmp_path: Path) -> None:
    fuzzer = PackageFuzzer(V1 / kind, tmp_path)
    fuzzer.run_all(range(1_000_000, 1_000_000 + CASES // len(KINDS) + 1))
    assert fuzzer.outcomes["refused"] > 0.7 * fuzzer.outcomes.total()
