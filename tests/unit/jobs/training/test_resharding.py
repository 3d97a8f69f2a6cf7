"""A checkpoint of any number of workers and ZeRO stage is gone on from by any other, exactly."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from cluster.errors import ConflictError
from cluster.storage import Storage
from jobs.data.catalog import DatasetCatalog
from jobs.data.dataset import Dataset
from jobs.models.families import make_family
from jobs.models.family import DataShape
from jobs.training.batching import BatchPlan
from jobs.training.checkpointing import FolderStore
from jobs.training.config import TrainConfig
from jobs.training.deepspeed_config import make_deepspeed_config
from jobs.training.deepspeed_setup import start_deepspeed
from jobs.training.engine import Engine
from jobs.training.events import Event, Progress, Started
from jobs.training.manifest import MANIFEST_FILE, Manifest
from jobs.training.parallelism import Layout
from jobs.training.process_group import start_process_group
from jobs.training.saving import Saver
from jobs.training.worker import WorkerJob, _Worker, run_worker
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
    """One training after the other in the same processes; what is exported is tested elsewhere."""
    _Worker._export = lambda self: None  # type: ignore[assignment, method-assign, return-value]
    events: dict[str, list[Event]] = {name: [] for name in jobs}
    for name, job in jobs.items():
        run_worker(job, events[name].append)
    return events


def losses(events: list[Event]) -> dict[int, float]:
    return {event.step: event.loss for event in events if isinstance(event, Progress)}


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
    run_ranks(train_all, {"": WorkerJob(configs["1"], digits.directory, tmp_path)}, 2)
    source = tmp_path / "checkpoints"
    kinds = {name.split("/")[0] for name in whole_state(source)}
    assert kinds == {"master", "exp_avg", "exp_avg_sq", "step"}
    for world_size in (1, 2):
        passing = Passing(configs, digits.directory, source, tmp_path / str(world_size))
        differing = run_ranks(load_and_save_again, passing, world_size)[0]
        assert differing == {name: [] for name in configs}, world_size


def test_a_run_goes_on_at_other_sizes_and_stages_as_if_unbroken(
    make_config: MakeConfig, digits: Dataset, tmp_path: Path
) -> None:
    def job(steps: int, stage: int, run: str, **values: Any) -> WorkerJob:
        config = make_config(
            model=MODEL,
            steps=steps,
            schedule={"kind": "constant"},
            checkpoint={"every_steps": 100},
            deepspeed={"zero_optimization": {"stage": stage, **values}},
            # So that one worker accumulates over four micro-batches, and two over two.
            micro_batch_size=4,
        )
        return WorkerJob(config, digits.directory, tmp_path / run)

    unbroken = train_alone(job(8, 1, "unbroken"))
    parts = [
        run_ranks(train_all, {"": job(2, 1, "moved")}, 2)[0][""],
        train_alone(job(4, 3, "moved")),
        *run_ranks(
            train_all,
            {
                "2": job(6, 2, "moved", offload_optimizer=OFFLOAD),
                "0": job(8, 0, "moved"),
            },
            2,
        )[0].values(),
    ]
    starts = [event.first_step for part in parts for event in part if isinstance(event, Started)]
    assert starts == [0, 2, 4, 6]
    # Sums over workers are taken in another order; nothing else differs.
    moved = {step: loss for part in parts for step, loss in losses(part).items()}
    assert moved == pytest.approx(losses(unbroken), rel=1e-5)


def train_alone(job: WorkerJob) -> list[Event]:
    found: dict[str, list[Event]] = run_ranks(train_all, {"": job}, 1)[0]
    return found[""]


@pytest.mark.parametrize(
    "values",
    [
        {"deepspeed": {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}},
        {"precision": "bf16", "deepspeed": {"zero_optimization": {"stage": 3}}},
    ],
    ids=["bf16 section", "autocast"],
)
def test_resuming_at_the_same_size_is_exact(
    make_config: MakeConfig, digits: Dataset, tmp_path: Path, values: dict[str, Any]
) -> None:
    jobs = {
        name: WorkerJob(
            make_config(steps=steps, schedule={"kind": "constant"}, **values),
            digits.directory,
            tmp_path / run,
        )
        for name, run, steps in (
            ("unbroken", "unbroken", 6),
            ("first half", "broken", 3),
            ("second half", "broken", 6),
        )
    }
    unbroken, first, second = run_ranks(train_all, jobs, 2)[0].values()
    assert losses(first) | losses(second) == losses(unbroken)


def test_their_schedule_goes_on_where_it_was(
    make_config: MakeConfig, digits: Dataset, tmp_path: Path
) -> None:
    warmup = {"warmup_min_lr": 0, "warmup_max_lr": 2e-3, "warmup_num_steps": 6}
    raw = {"scheduler": {"type": "WarmupLR", "params": {**warmup, "warmup_type": "linear"}}}
    jobs = {
        name: WorkerJob(make_config(steps=steps, deepspeed=raw), digits.directory, tmp_path / run)
        for name, run, steps in (("all", "one", 6), ("first", "two", 3), ("second", "two", 6))
    }
    whole, first, second = (
        [event.learning_rate for event in events if isinstance(event, Progress)]
        for events in run_ranks(train_all, jobs, 1)[0].values()
    )
    assert first + second == whole
    assert whole[-1] > whole[2]


def test_a_divided_model_goes_on_in_any_number_of_copies_and_no_other_division(
    make_config: MakeConfig, text_data: dict[str, Any], tmp_path: Path
) -> None:
    catalog = DatasetCatalog(Storage.open(str(tmp_path / "storage")), tmp_path / "cache")

    def config(steps: int, stage: int, **values: Any) -> TrainConfig:
        return make_config(
            data=text_data,
            model={"family": "causal_lm", "hidden_size": 16, "num_layers": 2, "num_heads": 2},
            schedule={"kind": "constant"},
            steps=steps,
            deepspeed={"zero_optimization": {"stage": stage}},
            **values,
        )

    dataset, _ = catalog.ensure(config(1, 1).data)
    for kind, stages in (("tensor", (2, 1)), ("pipeline", (1, 0))):
        before, after = (
            config(steps, stage, parallelism={kind: 2})
            for steps, stage in zip((2, 4), stages, strict=True)
        )
        job = WorkerJob(before, dataset.directory, tmp_path / kind)
        (first,) = run_ranks(train_all, {"": job}, 4)[0].values()
        jobs = {
            name: WorkerJob(after, dataset.directory, tmp_path / name)
            for name in (kind, f"{kind}, unbroken")
        }
        second, unbroken = run_ranks(train_all, jobs, 2)[0].values()
        assert losses(first) | losses(second) == pytest.approx(losses(unbroken), rel=1e-4)
    refused = WorkerJob(config(6, 1), dataset.directory, tmp_path / "pipeline")
    (message,) = run_ranks(refusal, refused, 1)
    assert (
        "is of a model divided by parallelism.tensor 1 and pipeline 2, and this run has tensor 1 "
        "and pipeline 1; set them back (num_workers may differ), or --set resume=never" in message
    )


def refusal(job: WorkerJob) -> str:
    try:
        train_all({"": job})
    except ConflictError as error:
        return str(error)
    return ""
