"""What an operator types to say whose packages count, and what the audit log keeps of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner, Result

from cluster.cli.app import app
from cluster.database import audit_log, open_database
from cluster.errors import InputError, NotFoundError, NotRunningError, UsageError
from cluster.model_package import SigningKeys, ensure_local_key, open_keyset
from cluster.settings import Settings


@pytest.fixture
def keys(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> SigningKeys:
    monkeypatch.setenv("HELIOSTAT_HOME", str(settings.home))
    ensure_local_key(settings.keys_dir)
    return SigningKeys(settings.keys_dir)


def run(*arguments: str) -> Result:
    command = ["models", "keys", *arguments]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def listed() -> dict[str, Any]:
    return {row["fingerprint"]: row for row in json.loads(run("list", "--json").stdout)}


def audited(settings: Settings) -> list[tuple[str, str, dict[str, Any]]]:
    with open_database(settings.database).connect() as connection:
        rows = connection.execute(sa.select(audit_log).order_by(audit_log.c.id)).all()
    return [(row.action, row.target, row.detail) for row in rows]


def test_a_key_is_rotated_and_the_old_one_revoked(settings: Settings, keys: SigningKeys) -> None:
    old = keys.local()
    run("rotate")
    new = keys.local()
    assert f"revoked {old}" in run("revoke", old[:12], "--reason", "a laptop was lost").stdout
    rows = listed()
    assert (rows[new]["state"], rows[new]["signs_here"]) == ("trusted", True)
    assert rows[old]["state"] == "revoked"
    assert "a laptop was lost" in rows[old]["note"]
    assert audited(settings) == [
        ("signing_key.rotate", new, {}),
        ("signing_key.revoke", old, {"reason": "a laptop was lost"}),
    ]


def test_revoking_the_key_in_use_says_what_to_do(keys: SigningKeys) -> None:
    assert "models keys rotate" in run("revoke", keys.local(), "--reason", "x").stdout


def test_a_partners_key_is_trusted(settings: Settings, keys: SigningKeys, tmp_path: Path) -> None:
    partner = ensure_local_key(tmp_path / "partner")
    run("trust", str(tmp_path / f"partner/trusted/{partner}.pub"))
    assert listed()[partner]["state"] == "trusted"
    assert audited(settings) == [("signing_key.trust", partner, {})]


def test_mistakes_change_nothing(settings: Settings, keys: SigningKeys, tmp_path: Path) -> None:
    for arguments, error in (
        (["trust", str(tmp_path / "none.pem")], InputError),
        (["trust", str(keys.private_key)], InputError),
        (["revoke", "0" * 10, "--reason", "x"], NotFoundError),
    ):
        with pytest.raises(error) as caught:
            CliRunner().invoke(app, ["models", "keys", *arguments], catch_exceptions=False)
        assert "\n" not in str(caught.value)
    assert [row["state"] for row in listed().values()] == ["trusted"]
    assert audited(settings) == []


def test_packages_are_encrypted_anew_only_where_that_is_on(
    settings: Settings, keys: SigningKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="ENCRYPT_PACKAGES"):
        CliRunner().invoke(app, ["models", "rekey"], catch_exceptions=False)
    monkeypatch.setenv("HELIOSTAT_ENCRYPT_PACKAGES", "true")
    with pytest.raises(NotRunningError, match="heliostat up"):
        CliRunner().invoke(app, ["models", "rekey"], catch_exceptions=False)
    open_keyset(settings).ensure()
    with pytest.raises(NotRunningError, match=r"storage folder .* is not there"):
        CliRunner().invoke(app, ["models", "rekey"], catch_exceptions=False)
    Path(settings.storage_root).mkdir()
    result = CliRunner().invoke(app, ["models", "rekey"], catch_exceptions=False)
    assert "0 packages" in result.stdout
    ((action, target, detail),) = audited(settings)
    assert (action, detail) == ("packages.rekey", {"num_packages": 0, "is_new": True})
    assert target == f"key {open_keyset(settings).open().primary_id}"
