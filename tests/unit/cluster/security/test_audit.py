"""What was done is listed, and stays as it was written."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from cluster.database import open_database
from cluster.security.audit import AuditLog


@pytest.fixture
def engine(tmp_path: Path) -> sa.Engine:
    return open_database(f"sqlite:///{tmp_path / 'heliostat.db'}")


def test_acts_are_listed_oldest_first_by_kind_and_time(engine: sa.Engine) -> None:
    log = AuditLog(engine)
    for action in ("key.create", "keyring", "key.revoke", "deploy"):
        log.record("ops/key_1", action, "target", {"why": action})
    assert [act.action for act in log.list(last=2)] == ["key.revoke", "deploy"]
    assert [act.action for act in log.list(action="key")] == ["key.create", "key.revoke"]
    assert [act.detail for act in log.list(action="deploy")] == [{"why": "deploy"}]
    assert log.list(since=datetime.now(UTC) + timedelta(minutes=1)) == []


@pytest.mark.parametrize("change", ["UPDATE audit_log SET actor = 'x'", "DELETE FROM audit_log"])
def test_the_log_only_grows(engine: sa.Engine, change: str) -> None:
    log = AuditLog(engine)
    log.record("ops/key_1", "deploy", "digits/3", {})
    with (
        pytest.raises(sa.exc.DatabaseError, match="only ever added to"),
        engine.begin() as connection,
    ):
        connection.execute(sa.text(change))
    assert [act.actor for act in log.list()] == ["ops/key_1"]
