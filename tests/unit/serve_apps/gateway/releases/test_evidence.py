"""Sums reach the database as they were observed, also when it is away for a while."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from cluster.database import open_database
from cluster.release_evidence import EvidenceDelta
from cluster.releases import ReleaseStore
from serve_apps.gateway.releases import evidence as module
from serve_apps.gateway.releases.evidence import Evidence
from serve_apps.gateway.releases.release import Release

RELEASE = Release("m", champion=1, candidate=2, id="rel_1", step=3)


class Table:
    """Adds up what it is given, unless it is away."""

    def __init__(self) -> None:
        self.is_away = False
        self.sums: dict[tuple[str, int, str, str], tuple[int, float]] = {}

    def add(self, deltas: Sequence[EvidenceDelta]) -> None:
        if self.is_away:
            raise OSError("disk gone")
        for delta in deltas:
            key = (delta.release_id, delta.step, delta.arm, delta.metric)
            num, total = self.sums.get(key, (0, 0.0))
            self.sums[key] = num + delta.num, total + delta.total


async def test_what_was_observed_while_the_database_was_away_is_handed_in_later() -> None:
    table = Table()
    evidence = Evidence(table.add)
    evidence.observe(RELEASE, "candidate", "errors", 1.0)
    table.is_away = True
    await evidence.flush()
    assert table.sums == {}
    evidence.observe(RELEASE, "candidate", "errors", 0.0)
    evidence.observe(RELEASE, "pair", "score_distance", 0.25)
    table.is_away = False
    await evidence.flush()
    await evidence.flush()
    assert table.sums == {
        ("rel_1", 3, "candidate", "errors"): (2, 1.0),
        ("rel_1", 3, "pair", "score_distance"): (1, 0.25),
    }


async def test_it_is_handed_in_by_itself_and_at_the_end() -> None:
    table = Table()
    evidence = Evidence(table.add)
    await evidence.start()
    evidence.observe(RELEASE, "candidate", "errors", 1.0)
    async with asyncio.timeout(10):
        while not table.sums:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    evidence.observe(RELEASE, "candidate", "errors", 1.0)
    await evidence.stop()
    assert table.sums["rel_1", 3, "candidate", "errors"] == (2, 2.0)


async def test_releases_that_come_and_go_without_a_database_are_bounded() -> None:
    table = Table()
    table.is_away = True
    evidence = Evidence(table.add)
    for number in range(module._MAX_SUMS + 100):
        release = Release("m", 1, 2, id=f"rel_{number}", step=1)
        evidence.observe(release, "candidate", "errors", 0.0)
    await evidence.flush()
    table.is_away = False
    await evidence.flush()
    assert len(table.sums) == module._MAX_SUMS


async def test_several_gateways_add_to_the_same_sums(tmp_path: Path) -> None:
    store = ReleaseStore(open_database(f"sqlite:///{tmp_path / 'evidence.db'}"))
    with store.writing() as tables:
        row = tables.create("m", 2, "sha256:2", {}, "asked", requested_by="ops")
        row = tables.compare(row, "shadow", "mirrored", mirror_share=1.0)
    release = Release("m", 1, 2, row.release_id, row.step)
    gateways = [Evidence(store.add_evidence) for _ in range(4)]
    for gateway in gateways:
        for value in (0.0, 1.0, 0.5):
            gateway.observe(release, "pair", "label_disagreement", value)
    await asyncio.gather(*(gateway.flush() for gateway in gateways))
    found = store.evidence(row)["pair", "label_disagreement"]
    assert (found.num, found.total) == (12, 6.0)
