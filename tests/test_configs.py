"""Every file in configs/ loads as the type of its directory and opens with its command."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from cluster.config import load_config
from jobs.compression.config import CompressConfig
from jobs.data.config import DataConfig, ExistingTokenizer
from jobs.evaluation.config import EvaluateConfig
from jobs.exporting.config import ExportConfig
from jobs.models.config import CausalLmConfig, PretrainedLmConfig
from jobs.prediction.config import PredictConfig
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
    "predict": PredictConfig,
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


def test_the_recipe_of_the_training_page_runs_as_printed(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    loaded = {}
    for kind, name, body in re.findall(
        r"```yaml\n# configs/(\w+)/(\w+)\.yaml\n(.*?)```", page, re.DOTALL
    ):
        path = tmp_path / f"{name}.yaml"
        path.write_text(body, encoding="utf-8")
        loaded[name] = load_config(path, TYPES[kind])
    corpus, base, assistant = (loaded[f"my_{name}"] for name in ("corpus", "base", "assistant"))
    assert isinstance(base, TrainConfig)
    assert isinstance(base.model, CausalLmConfig)
    assert base.data == corpus
    assert isinstance(assistant, TrainConfig)
    assert isinstance(assistant.model, PretrainedLmConfig)
    tokenizer = assistant.data.text.tokenizer
    assert isinstance(tokenizer, ExistingTokenizer)
    assert assistant.model.base == tokenizer.path == f"{base.name}@candidate"
    assert base.model.max_context_tokens is not None
    assert assistant.data.text.sequence_length <= base.model.max_context_tokens
    # A base trained here has a tokenizer of its own, which knows no chats.
    assert tokenizer.chat_template is not None
    assert (ROOT / tokenizer.chat_template).is_file()
