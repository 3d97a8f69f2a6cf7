"""What gateways count: one row for each replica, which goes when the replica is long gone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa

from cluster.database import drift_counts, open_database
from cluster.drift_counts import DriftStore
from cluster.statistics.drift import WindowCounts


def window(rows: float) -> WindowCounts:
    return WindowCounts(
        {"inputs": rows, "outputs": 0.0}, {"inputs": {"x": np.array([rows, 0.0])}, "outputs": {}}
    )


def test_a_replica_says_anew_what_it_has_counted(tmp_path: Path) -> None:
    store = DriftStore(open_database(f"sqlite:///{tmp_path / 'a.db'}"))
    for rows in (10.0, 20.0):
        store.write("gateway-1", "digits", 3, window(rows))
    store.write("gateway-2", "digits", 3, window(5.0))
    store.write("gateway-1", "digits", 4, window(7.0))
    found = store.windows("digits", 3)
    assert sorted(one.rows["inputs"] for one in found) == [5.0, 20.0]
    assert sorted(one.counts["inputs"]["x"][0] for one in found) == [5.0, 20.0]


def test_replicas_that_are_gone_do_not_count_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_database(f"sqlite:///{tmp_path / 'a.db'}")
    store = DriftStore(engine)
    monkeypatch.setattr("cluster.drift_counts.now", lambda: "2020-01-01T00:00:00.000+00:00")
    store.write("gateway-0", "digits", 3, window(9.0))
    monkeypatch.undo()
    assert store.windows("digits", 3) == []
    store.write("gateway-1", "digits", 3, window(1.0))
    with engine.connect() as connection:
        assert (
            connection.execute(sa.select(sa.func.count()).select_from(drift_counts)).scalar() == 1
        )
