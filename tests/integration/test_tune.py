"""A sweep as a user submits it: three trials, of which one diverges; then the same once more."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.model_ref import ModelRef
from cluster.registry import ModelRegistry
from cluster.tracking import open_client
from tests.stack import ROOT, Stack

pytestmark = pytest.mark.stack

SWEEP: dict[str, Any] = {
    "name": "tiny-sweep",
    "train": {
        "name": "swept",
        "data": {"name": "digits", "source": {"kind": "sklearn", "dataset": "digits"}},
        "model": {"family": "cnn", "channels": [4], "hidden_size": 16},
        "optimizer": {"name": "sgd", "weight_decay": 0.0},
        "gradient_clipping": 0.0,
        "steps": 12,
        "batch_size": 32,
        "log_every_steps": 2,
        "num_workers": 1,
    },
    "space": {
        # The last makes the weights infinite in its first steps.
        "optimizer.learning_rate": {"grid": [1.0e-6, 2.0e-2, 1.0e30]},
    },
    "search": "grid",
}


def result_of(output: str) -> dict[str, Any]:
    (line,) = [line for line in output.splitlines() if line.startswith("result: ")]
    values: dict[str, Any] = json.loads(line.removeprefix("result: "))
    return values


def test_a_sweep_that_is_told_to_end_ends_in_order(stack: Stack, tmp_path: Path) -> None:
    """And says how to go on; a trial under way counts as not begun, not as ended."""
    path = tmp_path / "sweep.yaml"
    sweep = {**SWEEP, "name": "ended-sweep", "train": {**SWEEP["train"], "steps": 100_000}}
    path.write_text(yaml.safe_dump(sweep), encoding="utf-8")
    with subprocess.Popen(
        [sys.executable, "-m", "jobs.tune", "--config", str(path)],
        env={**os.environ, **stack.environment},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as job:
        assert job.stdout is not None
        for line in job.stdout:
            if "started" in line:
                break
        job.terminate()
        out, err = job.communicate(timeout=120)
    assert job.returncode == 143, out + err
    assert err.strip().splitlines()[-1].startswith("the sweep was stopped; run the same command")
    assert "Traceback" not in out + err
    (ledger,) = (stack.settings.home / "sweeps").glob("ended-sweep-*/sweep.json")
    assert json.loads(ledger.read_text())["trials"] == {}


def test_the_best_trial_is_registered_and_nothing_is_repeated(stack: Stack, tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(SWEEP), encoding="utf-8")
    run = stack.run_cli("submit", "tune", "--config", path)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "Traceback" not in run.stdout + run.stderr
    assert re.search(r"trial 3 failed: .*loss is (nan|inf)", run.stdout)
    result = result_of(run.stdout)
    assert result["trials"] == {"finished": 2, "stopped": 0, "failed": 1}
    assert result["values"] == {"optimizer.learning_rate": 0.02}

    client = open_client(stack.settings)
    parent = client.get_run(result["sweep_run_id"])
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["best_run_id"] == result["run_id"]
    children = client.search_runs(
        [parent.info.experiment_id], f"tags.mlflow.parentRunId = '{parent.info.run_id}'"
    )
    statuses = {child.info.run_name: child.info.status for child in children}
    assert statuses == {
        "tiny-sweep-001": "FINISHED",
        "tiny-sweep-002": "FINISHED",
        "tiny-sweep-003": "FAILED",
    }
    rates = {child.data.params["optimizer.learning_rate"] for child in children}
    assert rates == {"1e-06", "0.02", "1e+30"}

    registry = ModelRegistry.open(stack.settings)
    (version,) = registry.list_versions("swept")
    assert version == registry.resolve(ModelRef.parse("swept@candidate"))
    assert (version.digest, version.run_id) == (result["digest"], result["run_id"])

    again = stack.run_cli("submit", "tune", "--config", path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "already tuned: swept/1" in again.stdout
    assert "started" not in again.stdout
    assert result_of(again.stdout) == result
    assert len(registry.list_versions("swept")) == 1
