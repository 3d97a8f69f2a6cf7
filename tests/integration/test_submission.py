"""Jobs as a user submits them, by our command and by Ray's own."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.errors import ConfigError
from serve_apps.release.training_jobs import RayTrainingJobs
from tests.stack import HELIOSTAT, ROOT, Stack

pytestmark = pytest.mark.stack

CONFIG = "configs/prepare/digits.yaml"


def result_of(output: str) -> dict[str, str]:
    """The object in a job's last line."""
    (line,) = [line for line in output.splitlines() if line.startswith("result: ")]
    values: dict[str, str] = json.loads(line.removeprefix("result: "))
    return values


@pytest.fixture(scope="module")
def prepared(stack: Stack) -> dict[str, str]:
    run = stack.run_cli("submit", "prepare", "--config", CONFIG)
    assert run.returncode == 0, run.stdout + run.stderr
    return result_of(run.stdout)


def test_a_job_shows_its_output_and_ends_well(prepared: dict[str, str]) -> None:
    assert prepared["digest"].startswith("sha256:")


def test_a_config_outside_the_checkout_is_sent_along(
    stack: Stack, tmp_path: Path, prepared: dict[str, str]
) -> None:
    outside = tmp_path / "my digits.yaml"
    outside.write_bytes((ROOT / CONFIG).read_bytes())
    run = stack.run_cli("submit", "prepare", "--config", outside)
    assert run.returncode == 0, run.stdout + run.stderr
    assert result_of(run.stdout) == prepared


def test_rays_own_command_submits_as_well(stack: Stack, prepared: dict[str, str]) -> None:
    ray = shlex.quote(str(Path(sys.executable).parent / "ray"))
    exports = stack.run_cli("env").stdout
    job = f"{ray} job submit --working-dir . -- python -m jobs.prepare --config {CONFIG}"
    run = subprocess.run(
        ["bash", "-c", f"{exports}\n{job}"],
        env={"PATH": "/usr/bin:/bin", "HOME": str(stack.settings.home)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert result_of(run.stdout) == prepared
    uploads = stack.settings.home / "run" / "ray" / "session_latest" / "runtime_resources"
    shipped = {path.name for path in uploads.glob("working_dir_files/*/*")}
    assert {"cluster", "jobs", "configs"} <= shipped
    assert not {".venv", ".git", ".heliostat"} & shipped


def test_a_failing_job_fails_the_command_in_one_line(stack: Stack) -> None:
    run = stack.run_cli("submit", "prepare", "--config", CONFIG, "--set", "bogus=1")
    assert run.returncode == 1
    assert "unknown key 'bogus'" in run.stdout
    assert run.stderr.count("\n") == 1
    assert "jobs logs" in run.stderr
    assert "Traceback" not in run.stdout + run.stderr


def test_what_cannot_be_submitted_is_refused_at_once(stack: Stack) -> None:
    unknown = stack.run_cli("submit", "prepre", "--config", CONFIG)
    assert (unknown.returncode, unknown.stderr.count("\n")) == (2, 1)
    assert "prepare" in unknown.stderr
    missing = stack.run_cli("submit", "prepare", "--config", "configs/none.yaml")
    assert (missing.returncode, missing.stderr.count("\n")) == (2, 1)
    assert "configs/none.yaml" in missing.stderr


def test_leaving_a_job_lets_it_run_and_says_how_to_stop_it(stack: Stack) -> None:
    command = [str(HELIOSTAT), "submit", "prepare", "--config", CONFIG]
    with subprocess.Popen(
        command, env=stack.environment, cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None
        job_id = running.stdout.readline().split()[1]
        running.send_signal(signal.SIGINT)
        rest = running.stdout.read()
    assert f"heliostat jobs stop {job_id}" in rest
    assert "Traceback" not in rest
    deadline_s = time.monotonic() + 180
    while (status := job(stack, job_id)["status"]) in ("PENDING", "RUNNING"):
        assert time.monotonic() < deadline_s
        time.sleep(0.2)
    assert status == "SUCCEEDED"
    assert "result: " in stack.run_cli("jobs", "logs", job_id).stdout


def job(stack: Stack, job_id: str) -> dict[str, str]:
    listed = json.loads(stack.run_cli("jobs", "list", "--json").stdout)
    (found,) = [entry for entry in listed if entry["id"] == job_id]
    values: dict[str, str] = found
    return values


def test_an_unknown_job_id_is_one_line(stack: Stack) -> None:
    run = stack.run_cli("jobs", "logs", "none-such")
    assert (run.returncode, run.stderr.count("\n")) == (1, 1)


def test_a_job_of_an_id_is_submitted_once(stack: Stack, prepared: dict[str, str]) -> None:
    """As the release controller does it, which may be killed before it has noted the answer."""
    jobs = RayTrainingJobs(stack.settings)
    assert jobs.state("once") == "unknown"
    for _ in range(2):
        jobs.start("once", "prepare", CONFIG)
    deadline_s = time.monotonic() + 60
    while jobs.state("once") == "running":
        assert time.monotonic() < deadline_s
        time.sleep(0.2)
    assert jobs.state("once") == "succeeded"
    with pytest.raises(ConfigError, match="does not exist"):
        jobs.start("never", "train", "configs/train/nothing.yaml")
