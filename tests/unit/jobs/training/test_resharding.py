"""A checkpoint of any number of workers and ZeRO stage is gone on from by any other, exactly."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from jobs.data.dataset import Dataset
from jobs.models.families import make_family
from jobs.models.family import DataShape
from jobs.training.batching import BatchPlan
from jobs.training.checkpointing import FolderStore
from jobs.training.config import TrainConfig
from jobs.training.deepspeed_config import make_deepspeed_config
from jobs.training.deepspeed_setup import start_deepspeed
from jobs.training.engine import Engine
from jobs.training.events import Event
from jobs.training.manifest import MANIFEST_FILE, Manifest
from jobs.training.parallelism import Layout
from jobs.training.process_group import start_process_group
from jobs.training.saving import Saver
from jobs.training.worker import WorkerJob, run_worker
from tests.unit.jobs.training.conftest import MakeConfig
from tests.unit.jobs.training.ranks import run_ranks

# Odd sizes: nothing divides by the number of workers, so every kind of padding occurs.
MODEL = {"family": "cnn", "channels": [3], "hidden_size": 7, "dropout": 0.0}
OFFLOAD = {"device": "cpu"}
LAYOUTS: dict[str, dict[str, Any]] = {
    "0": {"stage": 0},
    "1": {"stage": 1},
    "2": {"stage": 2, "offload_optimizer": OFFLOAD},
    "3": {"stage": 3, "stage3_param_persistence_threshold": 10},
    "3, offloaded": {"stage": 3, "offload_optimizer": OFFLOAD, "offload_param": OFFLOAD},
}
STEPS = 3


@dataclass(frozen=True)
class Passing:
    """Checkpoints to load into engines and to save again."""

    configs: dict[str, TrainConfig]
    dataset_dir: Path
    source: Path
    target: Path


def load_and_save_again(passing: Passing) -> dict[str, list[str]]:
    """By engine, what is not the same afterwards."""
    differing = {}
    expected = whole_state(passing.source)
    for name, config in passing.configs.items():
        engine, group, layout = make_engine(config, passing.dataset_dir)
        old, new = (
            Saver(engine, FolderStore(root, keep=2), group, layout, ignore, scratch=root)
            for root in (passing.source, passing.target / name)
        )
        restored = old.restore()
        assert restored is not None
        new.start(restored.step, restored.memory)
        new.wait()
        with engine.whole_model() as module:
            weights = {f"master/{key}": value for key, value in module.named_parameters()}
            if group.is_first:
                found = whole_state(passing.target / name)
                differing[name] = [
                    *expected.keys() ^ found.keys(),
                    *(key for key, value in found.items() if not torch.equal(value, expected[key])),
                    *(
                        f"model's {key}"
                        for key, value in weights.items()
                        if not torch.equal(value.flatten(), expected[key].to(value.dtype))
                    ),
                ]
    return differing


def make_engine(config: TrainConfig, dataset_dir: Path) -> tuple[Engine, Any, Layout]:
    torch.set_num_threads(1)
    group = start_process_group()
    layout = Layout.of(config, group.world_size)
    dataset = Dataset.open(dataset_dir)
    family = make_family(config.model, DataShape.of(dataset.info))
    plan = BatchPlan.make(
        batch_size=config.batch_size, micro_batch_size=None, world_size=group.world_size
    )
    # Other weights than those that are saved.
    torch.manual_seed(99)
    deepspeed_config = make_deepspeed_config(config, plan)
    engine = start_deepspeed(family.build(), family, config, deepspeed_config, group, layout)
    return engine, group, layout


def ignore(_event: Event) -> None:
    pass


def train_all(jobs: dict[str, WorkerJob]) -> dict[str, list[Event]]:
    events: dict[str, list[Event]] = {name: [] for name in jobs}
    for name, job in jobs.items():
        run_worker(job, events[name].append)
    return events


def whole_state(checkpoints: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the only checkpoint, put together."""
    (directory,) = checkpoints.glob("step-*")
    manifest = Manifest.from_bytes((directory / MANIFEST_FILE).read_bytes())
    pieces: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for file, record in manifest.files.items():
        with safe_open(str(directory / file), framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no dict
                start, _ = record.ranges[name.split("/", 1)[1]]
                pieces.setdefault(name, []).append((start, tensors.get_tensor(name)))
    return {
        name: found[0][1]
        if found[0][1].dim() == 0
        else torch.cat([piece for _, piece in sorted(found, key=lambda one: one[0])])
        for name, found in pieces.items()
    }


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
def test_every_layout_loads_and_saves_the_same_state_bit_by_bit(
    make_config: MakeConfig, digits: Dataset, tmp_path: Path, half: bool
) -> None:
    precision = {"bf16": {"enabled": True}} if half else {}
    configs = {
        name: make_config(
            model=MODEL, steps=STEPS, deepspeed={"zero_optimization": zero, **precision}
        )
        for name, zero in LAYOUTS.items()
    }
    first = WorkerJob(configs["1"], digits.directory, tmp_path)
    run_ranks(train_all, {"first": first}, 2)
    source = tmp_path / "checkpoints"
    expected = whole_state(source)
    assert {name.split("/")[0] for name in expected} == {"master", "exp_avg", "exp_avg_sq", "step"}
    for world_size in (1, 2):
        target = tmp_path / str(world_size)
        passing = Passing(configs, digits.directory, source, target)
        differing = run_ranks(load_and_save_again, passing, world_size)[0]
        assert differing == {name: [] for name in configs}, world_size
