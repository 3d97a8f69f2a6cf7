from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from cluster.database import api_keys, audit_log, open_database
from cluster.errors import (
    AuthenticationError,
    ConflictError,
    InputError,
    NotFoundError,
    PermissionDeniedError,
)
from cluster.security.api_keys import ApiKeys
from cluster.security.audit import AuditLog
from cluster.security.limits import UNLIMITED, TenantLimits


@pytest.fixture
def engine(tmp_path: Path) -> sa.Engine:
    return open_database(f"sqlite:///{tmp_path / 'heliostat.db'}")


@pytest.fixture
def keys(engine: sa.Engine) -> ApiKeys:
    return ApiKeys(engine)


def test_a_created_key_verifies_as_its_tenant(keys: ApiKeys) -> None:
    created = keys.create("team", ["infer", "infer", "models:read"])
    identity = keys.verify(created.key)
    assert (identity.key_id, identity.tenant) == (created.id, "team")
    assert identity.scopes == {"infer", "models:read"}


def test_keys_carry_the_prefix_and_never_repeat(keys: ApiKeys) -> None:
    made = [keys.create("team", ["infer"]).key for _ in range(20)]
    assert all(key.startswith("hst_") and len(key) >= 40 for key in made)
    assert len(set(made)) == len(made)


def test_the_database_never_holds_the_key(keys: ApiKeys, tmp_path: Path) -> None:
    created = keys.create("team", ["infer"])
    stored = b"".join(path.read_bytes() for path in tmp_path.iterdir() if path.is_file())
    assert created.key.encode() not in stored
    assert created.key.removeprefix("hst_").encode() not in stored


@pytest.mark.parametrize("key", ["", "hst_wrong", "x" * 5000, "hst_é"])
def test_an_unknown_key_is_refused(keys: ApiKeys, key: str) -> None:
    keys.create("team", ["infer"])
    with pytest.raises(AuthenticationError):
        keys.verify(key)


def test_a_hash_is_not_a_key(keys: ApiKeys, engine: sa.Engine) -> None:
    keys.create("team", ["infer"])
    with engine.connect() as connection:
        stored = connection.execute(sa.select(api_keys.c.key_hash)).scalar_one()
    with pytest.raises(AuthenticationError):
        keys.verify(stored)


def test_a_revoked_key_is_refused_and_revoking_again_changes_nothing(keys: ApiKeys) -> None:
    created = keys.create("team", ["infer"])
    keys.revoke(created.id)
    revoked_at = keys.list()[0].revoked_at
    keys.revoke(created.id)
    assert keys.list()[0].revoked_at == revoked_at
    with pytest.raises(AuthenticationError, match="revoked"):
        keys.verify(created.key)


def test_an_expired_key_is_refused(keys: ApiKeys, engine: sa.Engine) -> None:
    created = keys.create("team", ["infer"], datetime.now(UTC) + timedelta(hours=1))
    assert keys.verify(created.key).tenant == "team"
    past = (datetime.now(UTC) - timedelta(seconds=1)).isoformat(timespec="milliseconds")
    with engine.begin() as connection:
        connection.execute(sa.update(api_keys).values(expires_at=past))
    with pytest.raises(AuthenticationError, match="expired"):
        keys.verify(created.key)
    assert keys.list()[0].state == "expired"


def test_a_missing_scope_is_named(keys: ApiKeys) -> None:
    identity = keys.verify(keys.create("team", ["infer"]).key)
    identity.require("infer")
    with pytest.raises(PermissionDeniedError, match="'admin'"):
        identity.require("admin")


def test_bad_requests_name_the_field(keys: ApiKeys) -> None:
    past = datetime.now(UTC) - timedelta(days=1)
    cases: dict[str, Callable[[], object]] = {
        "scopes": lambda: keys.create("team", ["everything"]),
        "tenant": lambda: keys.create("../team", ["infer"]),
        "expires_at": lambda: keys.create("team", ["infer"], past),
        "key": lambda: keys.create("team", ["infer"], key="short"),
        "models": lambda: keys.create("team", ["infer"], models=["digits/3"]),
        "max_streams": lambda: keys.set_tenant("team", {"max_streams": 0}),
    }
    for param, call in cases.items():
        with pytest.raises(InputError) as caught:
            call()
        assert caught.value.param == param
    assert keys.list() == []
    assert keys.list_tenants() == []


def test_a_brought_key_is_stored_once(keys: ApiKeys) -> None:
    secret = "hst_" + "k" * 40
    assert keys.create("team", ["infer"], key=secret).key == secret
    with pytest.raises(ConflictError):
        keys.create("team", ["infer"], key=secret)
    assert keys.verify(secret).tenant == "team"


def test_a_key_may_be_for_some_models_only(keys: ApiKeys) -> None:
    some = keys.verify(keys.create("team", ["infer"], models=["b", "a", "b"]).key)
    every = keys.verify(keys.create("team", ["infer"]).key)
    assert (some.may_use("a"), some.may_use("c"), every.may_use("c")) == (True, False, True)
    assert sorted(str(key.models) for key in keys.list()) == ["('a', 'b')", "None"]
    with pytest.raises(InputError, match="no model at all"):
        keys.create("team", ["infer"], models=[])


def test_a_key_carries_its_tenants_limits(keys: ApiKeys, engine: sa.Engine) -> None:
    key = keys.create("team", ["infer"]).key
    assert keys.verify(key).limits == UNLIMITED
    keys.set_tenant("team", {"requests_per_minute": 5, "max_streams": 2}, actor="alice")
    changed = keys.set_tenant("team", {"max_streams": None, "monthly_tokens": 10**9})
    expected = TenantLimits(requests_per_minute=5, monthly_tokens=10**9)
    assert keys.verify(key).limits == changed.limits == expected
    assert [tenant.limits for tenant in keys.list_tenants()] == [expected]
    first, second = AuditLog(engine).list(action="tenant.limits")
    assert (first.actor, first.target) == ("alice", "team")
    assert second.detail == {"max_streams": None, "monthly_tokens": 10**9}


def test_an_unknown_id_cannot_be_revoked(keys: ApiKeys) -> None:
    with pytest.raises(NotFoundError, match="key_none"):
        keys.revoke("key_none")


def test_making_and_ending_keys_is_audited_without_the_secret(
    keys: ApiKeys, engine: sa.Engine
) -> None:
    created = keys.create("team", ["infer"], actor="alice")
    keys.revoke(created.id, actor="bob")
    with engine.connect() as connection:
        rows = connection.execute(sa.select(audit_log).order_by(audit_log.c.id)).all()
    assert [(row.actor, row.action, row.target) for row in rows] == [
        ("alice", "tenant.create", "team"),
        ("alice", "key.create", created.id),
        ("bob", "key.revoke", created.id),
    ]
    assert created.key not in str(rows)
