"""Every file in configs/ loads as the type of its directory and opens with its command."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from cluster.config import load_config
from jobs.compression.config import CompressConfig
from jobs.data.config import DataConfig
from jobs.evaluation.config import EvaluateConfig
from jobs.exporting.config import ExportConfig
from jobs.promotion.config import ServiceConfig
from jobs.training.batching import BatchPlan
from jobs.training.config import TrainConfig
from jobs.training.deepspeed_config import make_deepspeed_config
from jobs.training.parallelism import Layout
from jobs.tuning.config import TuneConfig
from serve_apps.options import DeploymentOptions

ROOT = Path(__file__).parent.parent
TYPES: dict[str, type[BaseModel]] = {
    "prepare": DataConfig,
    "train": TrainConfig,
    "tune": TuneConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
    "compress": CompressConfig,
    "serve": DeploymentOptions,
    "services": ServiceConfig,
}
FILES = sorted((ROOT / "configs").rglob("*"))


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.is_file()], ids=lambda path: path.name
)
def test_a_file_loads_as_the_type_of_its_directory(path: Path) -> None:
    assert path.suffix == ".yaml"
    load_config(path, TYPES[path.parent.name])


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/train/*.yaml")), ids=lambda p: p.name)
def test_a_training_config_gives_a_deepspeed_config(path: Path) -> None:
    config = load_config(path, TrainConfig)
    plan = BatchPlan.make(
        batch_size=config.batch_size,
        micro_batch_size=config.micro_batch_size,
        world_size=Layout.of(config, config.num_workers).num_copies,
    )
    assert make_deepspeed_config(config, plan)["train_batch_size"] == config.batch_size


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.is_file()], ids=lambda path: path.name
)
def test_a_file_opens_with_the_command_that_runs_it(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    relative = path.relative_to(ROOT).as_posix()
    assert re.fullmatch(rf"# heliostat .*--config {re.escape(relative)}( .*)?", first)
