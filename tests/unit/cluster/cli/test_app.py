import errno
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from cluster.cli import app as cli
from cluster.cli.moments import parse_expiry, parse_since
from cluster.errors import InputError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HELIOSTAT_HOME", str(tmp_path))
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["heliostat", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def test_a_key_is_printed_once_and_its_id_listed_and_revoked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "keys", "create", "--tenant", "team", "--expires", "30d") == 0
    key = capsys.readouterr().out.strip()
    assert key.startswith("hst_")
    assert run(monkeypatch, "keys", "list", "--json") == 0
    text = capsys.readouterr().out
    (listed,) = json.loads(text)
    assert key not in text
    assert (listed["tenant"], listed["scopes"], listed["state"]) == ("team", ["infer"], "active")
    assert run(monkeypatch, "keys", "revoke", listed["id"]) == 0
    capsys.readouterr()
    assert run(monkeypatch, "keys", "list") == 0
    assert "revoked" in capsys.readouterr().out


def test_the_version_is_that_of_the_installed_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"heliostat {importlib.metadata.version('heliostat')}\n"


def test_an_error_is_one_line_and_sets_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "keys", "revoke", "key_none") == 1
    assert capsys.readouterr().err.splitlines() == [
        "error: there is no API key 'key_none'; see `heliostat keys list`"
    ]
    assert run(monkeypatch, "keys", "create", "--tenant", "t", "--scope", "everything") == 2
    assert "everything" in capsys.readouterr().err


def test_a_wrong_setting_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HELIOSTAT_GATEWAY_PORT", "many")
    assert run(monkeypatch, "status") == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_mistake_of_ours_is_one_line_too_and_its_traceback_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("cluster.cli.keys._keys", lambda: 1 / 0)
    assert run(monkeypatch, "keys", "list") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "ZeroDivisionError" in line
    assert "Traceback" in Path(line.rsplit(" ", 1)[1]).read_text()


def test_a_disk_that_cannot_be_used_is_one_line_and_no_mistake_of_ours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/home/x")

    monkeypatch.setattr("cluster.cli.keys._keys", full)
    assert run(monkeypatch, "keys", "list") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "'/home/x' cannot be used: No space left on device" in line
    assert "report" not in line


@pytest.mark.parametrize("verb", ["import", "export", "verify", "backup", "restore"])
def test_a_path_that_is_too_long_is_one_short_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, verb: str
) -> None:
    path = "/".join([str(tmp_path), "x" * 5000])
    arguments = {
        "import": ["models", "import", path, "--name", "m"],
        "export": ["models", "export", "m/1", "--to", path],
        "verify": ["models", "verify", path],
    }.get(verb, [verb, path])
    assert run(monkeypatch, *arguments) in (1, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert "report" not in line
    assert len(line) < 300


def test_a_verb_that_is_told_to_end_runs_its_endings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            print("ended")

    monkeypatch.setattr("cluster.cli.keys._keys", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert run(monkeypatch, "keys", "list") == 128 + signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().out == "ended\n"


def test_env_before_the_first_start_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "env") == 1
    assert "heliostat up" in capsys.readouterr().err


def test_down_of_what_never_ran_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, "down") == 0


def test_doctor_names_a_next_step_for_every_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run(monkeypatch, "doctor", "--json")
    checks = json.loads(capsys.readouterr().out)
    assert {"Python", "C++ compiler", "free disk", "ports"} <= {check["name"] for check in checks}
    assert all(check["next_step"] for check in checks if not check["ok"])
    assert code == (0 if all(check["ok"] for check in checks) else 1)


def test_every_verb_explains_itself() -> None:
    import typer

    def walk(command: Any, name: str) -> None:
        assert command.help or command.short_help, name
        for child, sub in getattr(command, "commands", {}).items():
            walk(sub, f"{name} {child}")

    walk(typer.main.get_command(cli.app), "heliostat")


def test_an_unknown_verb_is_a_usage_error() -> None:
    command = [sys.executable, "-m", "cluster.cli.app", "fly"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_expiries_are_durations_or_times() -> None:
    in_a_month = parse_expiry("30d")
    assert in_a_month is not None
    assert abs(in_a_month - datetime.now(UTC) - timedelta(days=30)) < timedelta(minutes=1)
    assert parse_expiry("2031-02-03T04:05:06Z") == datetime(2031, 2, 3, 4, 5, 6, tzinfo=UTC)
    assert parse_expiry("2031-02-03") == datetime(2031, 2, 3, tzinfo=UTC)
    assert parse_expiry(None) is None
    for text in ("soon", "0d", "-3d", "30"):
        with pytest.raises(InputError):
            parse_expiry(text)


def test_a_moment_in_the_past_is_a_duration_or_a_time() -> None:
    yesterday = parse_since("1d")
    assert yesterday is not None
    assert abs(datetime.now(UTC) - timedelta(days=1) - yesterday) < timedelta(minutes=1)
    with pytest.raises(InputError, match="since 'ever' is no time"):
        parse_since("ever")


def test_usage_is_a_table_of_what_each_tenant_used(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], home: Path
) -> None:
    from cluster.database import open_database
    from cluster.ledger import Entry, Ledger

    assert run(monkeypatch, "usage") == 0
    assert capsys.readouterr().out == "nothing was used\n"
    used = Entry("k", tenant="acme", kind="training", model="lm", source="run", cpu_s=12.34)
    Ledger(open_database(f"sqlite:///{home / 'heliostat.db'}")).record([used])
    assert run(monkeypatch, "usage") == 0
    titles, row = capsys.readouterr().out.splitlines()
    assert titles.split()[:3] == ["TENANT", "KIND", "MODEL"]
    assert row.split() == ["acme", "training", "lm", "0", "0", "0", "12.3", "0.0"]
    assert run(monkeypatch, "usage", "--json", "--tenant", "acme", "--since", "1h") == 0
    (listed,) = json.loads(capsys.readouterr().out)
    assert (listed["cpu_s"], listed["num_entries"]) == (12.3, 1)
    assert run(monkeypatch, "usage", "--tenant", "other") == 0
    assert capsys.readouterr().out == "nothing was used\n"


def test_usage_may_be_by_key_and_version(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], home: Path
) -> None:
    from cluster.database import open_database
    from cluster.ledger import Entry, Ledger

    entry = Entry("k", tenant="acme", kind="inference", model="digits", source="key_1", version=3,
                  num_requests=42)  # fmt: skip
    Ledger(open_database(f"sqlite:///{home / 'heliostat.db'}")).record([entry])
    assert run(monkeypatch, "usage", "--by", "key", "--by", "version") == 0
    titles, row = capsys.readouterr().out.splitlines()
    assert titles.split()[3:6] == ["VERSION", "SOURCE", "NUM"]
    assert row.split()[3:6] == ["3", "key_1", "42"]


def test_a_tenants_limits_are_set_and_listed_and_the_act_is_in_the_audit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(*arguments: str) -> Any:
        assert run(monkeypatch, *arguments, "--json") == 0
        return json.loads(capsys.readouterr().out)

    call("tenants", "set", "acme", "--requests-per-minute", "60", "--monthly-tokens", "1000000")
    (changed,) = call("tenants", "set", "acme", "--requests-per-minute", "0", "--max-streams", "4")
    (listed,) = call("tenants", "list")
    assert changed == listed
    limits = ("requests_per_minute", "tokens_per_minute", "max_streams", "monthly_tokens")
    assert [listed[name] for name in limits] == [None, None, 4, 1_000_000]
    acts = call("audit", "--action", "tenant")
    assert [act["action"] for act in acts] == ["tenant.create", "tenant.limits", "tenant.limits"]
    assert acts[-1]["detail"] == {"requests_per_minute": None, "max_streams": 4}
    assert run(monkeypatch, "tenants", "set", "acme", "--max-streams", "-1") == 2
    assert "max_streams is -1" in capsys.readouterr().err
    assert run(monkeypatch, "audit") == 0
    assert '{"requests_per_minute": 60, ' in capsys.readouterr().out


def test_a_key_for_one_model_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "keys", "create", "--tenant", "acme", "--model", "digits") == 0
    assert run(monkeypatch, "keys", "create", "--tenant", "acme", "--model", "../x") == 2
    assert "'../x' is not valid" in capsys.readouterr().err
    assert run(monkeypatch, "keys", "list") == 0
    assert "digits" in capsys.readouterr().out
