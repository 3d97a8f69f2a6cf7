"""Drift on the real stack: other data is sent, the model is trained again, gated and released."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from sklearn.datasets import load_digits

from cluster.admin_client import AdminClient
from cluster.database import open_database
from cluster.retrainings import UNDER_WAY, Retraining, RetrainingStore
from cluster.security.audit import AuditLog
from tests.stack import Stack

pytestmark = [pytest.mark.soak, pytest.mark.stack, pytest.mark.timeout(600)]

OPTIONS = """
retrain:
  config: configs/train/digits.yaml
  service: configs/services/digits.yaml
  strategy: direct
  min_rows: 500
"""


def send(stack: Stack, pixels: Any) -> None:
    """Pictures, 50 in a request."""
    with httpx.Client(
        base_url=stack.settings.gateway_url,
        headers={"Authorization": f"Bearer {stack.key}"},
        timeout=30,
    ) as client:
        for start in range(0, len(pixels), 50):
            rows = pixels[start : start + 50]
            tensor = {
                "name": "pixels",
                "datatype": "FP32",
                "shape": list(rows.shape),
                "data": rows.reshape(-1).tolist(),
            }
            client.post("/v2/models/digits/infer", json={"inputs": [tensor]}).raise_for_status()


def test_other_data_leads_to_one_training_that_the_gate_decides_on(
    stack: Stack, tmp_path: Path
) -> None:
    trained = stack.run_cli("submit", "train", "--config", "configs/train/digits.yaml")
    assert trained.returncode == 0, trained.stderr
    options = tmp_path / "options.yaml"
    options.write_text(OPTIONS)
    deployed = stack.run_cli("deploy", "digits@candidate", "--config", options)
    assert deployed.returncode == 0, deployed.stderr

    store = RetrainingStore(open_database(stack.settings.database))
    send(stack, load_digits().data[:1000].astype(np.float32))
    time.sleep(6)  # until the gateway has counted it
    assert store.list("digits") == [], "what it was trained on is no drift"

    send(stack, 16 - load_digits().data[:1500].astype(np.float32))
    row = wait_for_the_end(store)
    assert row.state == "released", row.reason
    assert row.reason.startswith("PSI ")
    assert "passed the gate" in row.reason
    admin = AdminClient.open(stack.settings)
    deadline_s = time.monotonic() + 60
    while admin.deployment("digits", row.version + 1)["state"] != "champion":
        assert time.monotonic() < deadline_s, admin.deployments()
        time.sleep(0.2)
    acts = AuditLog(open_database(stack.settings.database)).list(action="retrain")
    assert [act.detail.get("state") for act in acts] == [None, "released"]


def wait_for_the_end(store: RetrainingStore) -> Retraining:
    deadline_s = time.monotonic() + 200
    while True:
        rows = store.list("digits")
        if rows and rows[-1].state not in UNDER_WAY:
            (row,) = rows
            return row
        assert time.monotonic() < deadline_s, rows
        time.sleep(0.5)
