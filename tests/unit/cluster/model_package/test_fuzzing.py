"""Whatever is done to a package, it is refused by name or it is the package that was signed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.package_fuzzing import PackageFuzzer

V1 = Path(__file__).parents[3] / "contract/v1"
KINDS = ("graph", "language_model", "adapter")
CASES = 1_000


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_packages_are_refused_or_are_the_same_package(kind: str, tmp_path: Path) -> None:
    """Seeds are fixed; `PackageFuzzer.run(seed)` runs one again. `make soak` runs other seeds."""
    fuzzer = PackageFuzzer(V1 / kind, tmp_path)
    fuzzer.run_all(range(CASES // len(KINDS) + 1))
    # A fuzzer that changes nothing, or nothing but noise, would prove nothing.
    assert fuzzer.outcomes["refused"] > 0.7 * fuzzer.outcomes.total()
    assert fuzzer.outcomes["same"] > 0
    assert fuzzer.outcomes["accepted"] > 0
