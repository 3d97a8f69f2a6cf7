"""The verb without a cluster: its check, and what it refuses before it looks for one."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.config import load_config
from cluster.errors import MachineError, NotRunningError
from cluster.settings import Settings
from jobs.tune import check, tune
from jobs.tuning.config import TuneConfig

ROOT = Path(__file__).parents[3]
CONFIGS = sorted((ROOT / "configs/tune").glob("*.yaml"))


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    # Training configs are named relative to the checkout.
    monkeypatch.chdir(ROOT)
    return Settings(home=tmp_path / "home", num_cpus=2, ray_port=1)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_passes_its_check_on_two_cpus(
    path: Path, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(path, TuneConfig)
    check(config, settings)
    printed = capsys.readouterr().out
    for part in (*config.space, "2 at a time on 2 CPUs", "steps at most", "parameters"):
        assert part in printed
    assert not settings.home.exists()


def test_a_trial_larger_than_the_machine_is_refused_by_its_check(settings: Settings) -> None:
    config = load_config(CONFIGS[0], TuneConfig, ["overrides.num_workers=4"])
    with pytest.raises(MachineError, match="num_workers is 4, and there are 2 CPUs"):
        check(config, settings)


def test_without_a_cluster_the_way_to_one_is_named(settings: Settings) -> None:
    with pytest.raises(NotRunningError, match="run `heliostat up`"):
        tune(load_config(CONFIGS[0], TuneConfig), settings)
    assert not settings.home.exists()
