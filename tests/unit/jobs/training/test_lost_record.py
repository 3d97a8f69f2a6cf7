"""A training whose MLflow run is gone goes on, in a new one."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.settings import Settings
from jobs.train import tracked
from jobs.training.launchers import LocalLauncher
from jobs.training.run_directory import RunState
from tests.unit.jobs.training.conftest import MakeConfig


def test_a_run_that_mlflow_lost_is_begun_anew_with_a_warning(
    make_config: MakeConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Such an MLflow keeps artifacts below the current directory.
    monkeypatch.chdir(tmp_path)
    settings = Settings(home=tmp_path, mlflow_tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")

    def follow(run_id: str) -> tuple[str, str]:
        state = RunState(tracking_run_id=run_id)
        with tracked(make_config(), settings, {}, LocalLauncher(1), {}, state) as tracker:
            return tracker.run_id, capsys.readouterr().out

    lost = "0" * 32
    begun, text = follow(lost)
    assert begun != lost
    assert f"warning: MLflow no longer has run {lost}" in text
    again, text = follow(begun)
    assert again == begun
    assert "warning" not in text
