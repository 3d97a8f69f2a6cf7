"""A run is recorded by a real server; training never waits for it and never fails by it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from cluster.errors import NotRunningError, StartError
from cluster.settings import Settings
from cluster.tracking import RunTracker, has_run, open_client


def test_a_run_keeps_everything_it_is_told(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "plot.txt").write_text("plot")
    committed = settings.model_copy(update={"git_commit": "abc"})
    parameters = {"optimizer": {"lr": 0.1}, "layers": [1, 2], "none": None}
    with RunTracker.start(committed, "e", "first", parameters, {"job": "7"}, "parent") as tracker:
        for step in range(1500):
            tracker.log_metrics({"loss": 1 / (step + 1), "lr": 0.1}, step)
        tracker.log_text("hello", "notes.txt")
        tracker.log_dict({"a": 1}, "config.yaml")
        tracker.log_artifact(tmp_path / "plot.txt", "plots")
        tracker.set_tags({"dataset": "x"})
    client = open_client(settings)
    run = client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"optimizer.lr": "0.1", "layers": "[1, 2]", "none": "None"}
    assert len(client.get_metric_history(tracker.run_id, "loss")) == 1500
    assert run.data.tags["mlflow.source.git.commit"] == "abc"
    assert run.data.tags["mlflow.parentRunId"] == "parent"
    assert (run.data.tags["job"], run.data.tags["dataset"]) == ("7", "x")
    files = {item.path for item in client.list_artifacts(tracker.run_id)}
    assert files == {"notes.txt", "config.yaml", "plots"}
    assert tracker.url == (
        f"{settings.tracking_uri}/#/experiments/{run.info.experiment_id}/runs/{tracker.run_id}"
    )


def test_a_run_goes_on_where_it_was(settings: Settings) -> None:
    with RunTracker.start(settings, "e", "r", {"lr": 1}) as first:
        first.log_metrics({"loss": 2.0}, 1)
    with RunTracker.start(settings, "e", "r", {"lr": 2, "new": 3}, run_id=first.run_id) as again:
        assert open_client(settings).get_run(again.run_id).info.status == "RUNNING"
        again.log_metrics({"loss": 1.0}, 2)
    run = open_client(settings).get_run(first.run_id)
    assert again.run_id == first.run_id
    assert run.data.params == {"lr": "1", "new": "3"}
    assert run.data.metrics["loss"] == 1.0


@pytest.mark.parametrize(("error", "status"), [(ValueError, "FAILED"), (SystemExit, "KILLED")])
def test_how_a_run_ended_is_kept(
    settings: Settings, error: type[BaseException], status: str
) -> None:
    with pytest.raises(error), RunTracker.start(settings, "e", "r") as tracker:
        raise error
    assert open_client(settings).get_run(tracker.run_id).info.status == status


def test_without_a_server_nothing_begins(settings_without_server: Settings) -> None:
    with pytest.raises(StartError, match="heliostat up") as caught:
        RunTracker.start(settings_without_server, "e", "r")
    assert "\n" not in str(caught.value)
    with pytest.raises(NotRunningError):
        open_client(settings_without_server)


def test_only_a_run_that_is_there_can_be_gone_on_with(settings: Settings) -> None:
    with RunTracker.start(settings, "e", "r") as tracker:
        pass
    assert has_run(settings, tracker.run_id)
    open_client(settings).delete_run(tracker.run_id)
    for run_id in (tracker.run_id, "0" * 32, "nope", "../a b?", "x" * 300):
        assert not has_run(settings, run_id), run_id


def test_an_unknown_run_is_one_line(settings: Settings) -> None:
    with pytest.raises(StartError, match="nope") as caught:
        RunTracker.start(settings, "e", "r", run_id="nope")
    assert "\n" not in str(caught.value)


def test_a_server_that_goes_away_costs_metrics_only(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = RunTracker.start(settings, "e", "r")
    with caplog.at_level(logging.WARNING):
        open_client(settings).delete_run(tracker.run_id)
        tracker.log_metrics({"loss": 1.0}, 1)
        tracker.log_text("x", "x.txt")
        tracker.set_tags({"a": "b"})
        tracker.finish()
    assert "were lost" in caplog.text
    assert "did not take tags" in caplog.text
