"""Fine-tuning by real workers: LoRA and whole, under every ZeRO stage, resumed, on two workers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cluster.storage import Storage
from jobs.data.catalog import DatasetCatalog
from jobs.data.dataset import Dataset
from jobs.training import compiling
from jobs.training.config import TrainConfig
from jobs.training.events import Event, Progress, Saved, Started
from jobs.training.worker import Outcome, WorkerJob, run_worker
from tests.tiny_models import CHAT_TEMPLATE, save_llama
from tests.unit.jobs.training.conftest import MakeConfig
from tests.unit.jobs.training.ranks import run_ranks

LORA = {"rank": 2, "alpha": 8}
ADAPTER, WHOLE = "adapter_model.safetensors", "model.safetensors"

Make = Callable[..., TrainConfig]


class InterruptedRunError(Exception):
    pass


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("finetuning")


@pytest.fixture(scope="module")
def base_dir(root: Path) -> Path:
    return save_llama(root / "base", "text", hidden_size=64)


@pytest.fixture(scope="module")
def data(root: Path, base_dir: Path) -> dict[str, Any]:
    (root / "template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    with (root / "chat.jsonl").open("w", encoding="utf-8") as file:
        for number in range(60):
            turns = [("user", f"say {number}"), ("assistant", f"{number}!")]
            messages = [{"role": role, "content": content} for role, content in turns]
            file.write(json.dumps({"messages": messages}) + "\n")
    tokenizer = {
        "kind": "existing",
        "path": str(base_dir),
        "chat_template": str(root / "template.jinja"),
    }
    return {
        "name": "chat",
        "source": {"kind": "chat", "paths": [str(root / "chat.jsonl")]},
        "text": {"tokenizer": tokenizer, "sequence_length": 48},
    }


@pytest.fixture(scope="module")
def make(make_config: MakeConfig, base_dir: Path, data: dict[str, Any]) -> Make:
    def config(stage: int = 0, lora: dict[str, Any] | None = None, **values: Any) -> TrainConfig:
        model = {"family": "causal_lm", "base": str(base_dir), "lora": lora}
        model["mask_documents"] = values.pop("mask_documents", False)
        return make_config(
            data=data,
            **{
                "model": model,
                "steps": 4,
                "batch_size": 4,
                "optimizer": {"learning_rate": 1e-2},
                "deepspeed": {"zero_optimization": {"stage": stage}},
                **values,
            },
        )

    return config


@pytest.fixture(scope="module")
def dataset(root: Path, make: Make) -> Dataset:
    catalog = DatasetCatalog(Storage.open(str(root / "storage")), root / "cache")
    return catalog.ensure(make().data)[0]


def train(job: WorkerJob) -> tuple[list[Event], Outcome]:
    events: list[Event] = []
    return events, run_worker(job, events.append)


def losses(events: list[Event]) -> dict[int, float]:
    return {event.step: event.loss for event in events if isinstance(event, Progress)}


def weights(run_dir: Path, name: str) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(run_dir / "export" / name)
    return found


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.allclose(value, second[name], atol=2e-4), name


@pytest.fixture(scope="module", params=[LORA, None], ids=["lora", "whole"])
def reference(
    request: pytest.FixtureRequest, root: Path, make: Make, dataset: Dataset
) -> tuple[dict[str, Any] | None, str, Path, dict[int, float]]:
    lora = request.param
    run_dir = root / f"reference-{bool(lora)}"
    events, outcome = train(WorkerJob(make(0, lora), dataset.directory, run_dir))
    assert outcome.exported.kind == ("adapter" if lora else "language_model")
    return lora, ADAPTER if lora else WHOLE, run_dir, losses(events)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_zero_stage_makes_the_same_model(
    reference: tuple[Any, str, Path, dict[int, float]],
    make: Make,
    dataset: Dataset,
    tmp_path: Path,
    stage: int,
) -> None:
    lora, name, run_dir, expected = reference
    events, _ = train(WorkerJob(make(stage, lora), dataset.directory, tmp_path))
    assert losses(events) == pytest.approx(expected, rel=1e-4)
    assert_same(weights(tmp_path, name), weights(run_dir, name))


def test_two_workers_make_the_model_of_one(
    reference: tuple[Any, str, Path, dict[int, float]],
    make: Make,
    dataset: Dataset,
    tmp_path: Path,
) -> None:
    lora, name, run_dir, expected = reference
    first, _ = run_ranks(train, WorkerJob(make(3, lora), dataset.directory, tmp_path), 2)
    assert losses(first[0]) == pytest.approx(expected, rel=1e-3)
    assert_same(weights(tmp_path, name), weights(run_dir, name))


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        (3, {"activation_checkpointing": True, "mask_documents": True}),
        (1, {"precision": "bf16"}),
        (0, {"optimizer": {"name": "muon", "learning_rate": 1e-2}}),
        (2, {"compile": True}),
    ],
)
def test_lora_learns_with_every_option(
    make: Make,
    dataset: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: int,
    options: dict[str, Any],
) -> None:
    # What torch.compile traces; the C++ it would write takes minutes.
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    events, _ = train(WorkerJob(make(stage, LORA, **options), dataset.directory, tmp_path))
    found = losses(events)
    assert found[3] < found[2] < found[1]


@pytest.mark.parametrize("stage", [2, 3])
def test_a_lora_run_resumes_from_what_it_trains_alone(
    make: Make, dataset: Dataset, root: Path, base_dir: Path, tmp_path: Path, stage: int
) -> None:
    config = make(stage, LORA, checkpoint={"every_steps": 2, "blocking": True})
    unbroken, _ = train(WorkerJob(config, dataset.directory, tmp_path / "unbroken"))
    events: list[Event] = []

    def stop_after_three(event: Event) -> None:
        events.append(event)
        if isinstance(event, Progress) and event.step == 3:
            raise InterruptedRunError

    job = WorkerJob(config, dataset.directory, tmp_path / "broken")
    with pytest.raises(InterruptedRunError):
        run_worker(job, stop_after_three)
    resumed, _ = train(job)
    assert next(e for e in resumed if isinstance(e, Started)).first_step == 2
    assert {**losses(events), **losses(resumed)} == pytest.approx(losses(unbroken), rel=1e-5)
    assert_same(weights(tmp_path / "broken", ADAPTER), weights(tmp_path / "unbroken", ADAPTER))
    saved = [event.size_bytes for event in unbroken if isinstance(event, Saved)]
    assert max(saved) < (base_dir / WHOLE).stat().st_size
