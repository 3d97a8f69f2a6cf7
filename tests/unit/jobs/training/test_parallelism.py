"""Models divided among workers have the losses, the metrics and the weights of one process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from cluster.errors import ConfigError
from cluster.storage import Storage
from jobs.data.catalog import DatasetCatalog
from jobs.data.dataset import Dataset
from jobs.models.causal_lm import CausalLm
from jobs.models.config import CausalLmConfig
from jobs.models.pipeline import cut
from jobs.training.batching import BatchPlan
from jobs.training.config import TrainConfig
from jobs.training.deepspeed_config import make_deepspeed_config
from jobs.training.estimate import estimate
from jobs.training.events import Evaluated, Event, Progress, Started
from jobs.training.expected_shape import expected_shape
from jobs.training.parallelism import Layout
from jobs.training.worker import Outcome, WorkerJob, run_worker
from tests.unit.jobs.training.conftest import MakeConfig
from tests.unit.jobs.training.ranks import run_ranks

STEPS = 20
TIED: dict[str, Any] = {"family": "causal_lm", "hidden_size": 32, "num_layers": 2, "num_heads": 4}
UNTIED: dict[str, Any] = {**TIED, "tie_embeddings": False, "num_key_value_heads": 2}


@dataclass(frozen=True)
class Record:
    """What the first worker has seen."""

    events: list[Event]
    outcome: Outcome

    @property
    def losses(self) -> dict[int, float]:
        return {event.step: event.loss for event in self.events if isinstance(event, Progress)}

    @property
    def evaluations(self) -> dict[tuple[int, str], float]:
        return {
            (event.step, event.split): event.metrics["loss"]
            for event in self.events
            if isinstance(event, Evaluated)
        }


def train_all(jobs: dict[str, WorkerJob]) -> dict[str, Record]:
    """One training after the other in the same processes."""
    records = {}
    for name, job in jobs.items():
        events: list[Event] = []
        outcome = run_worker(job, events.append)
        records[name] = Record(events, outcome)
    return records


@pytest.fixture(scope="module")
def text_section(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    lines = [f"{n} squared is {n * n}, and 定日镜 number {n} turns\n" for n in range(400)]
    path.write_text("".join(lines), encoding="utf-8")
    return {
        "name": "text",
        "source": {"kind": "text", "paths": [str(path)]},
        "splits": {"by": "position"},
        "text": {"tokenizer": {"kind": "bpe", "vocab_size": 300}, "sequence_length": 16},
    }


@pytest.fixture(scope="module")
def make_text_config(make_config: MakeConfig, text_section: dict[str, Any]) -> MakeConfig:
    def make(**values: Any) -> TrainConfig:
        defaults: dict[str, Any] = {
            "data": text_section,
            "model": TIED,
            "optimizer": {"learning_rate": 5e-3},
            # Low enough to be felt: a norm taken over a part of the weights would show.
            "gradient_clipping": 0.1,
            "steps": STEPS,
            "batch_size": 8,
            "micro_batch_size": 2,
            "schedule": {"kind": "constant"},
            "evaluate_every_steps": STEPS // 2,
            "checkpoint": {"every_steps": STEPS // 2},
        }
        return make_config(**{**defaults, **values})

    return make


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, make_text_config: MakeConfig) -> Dataset:
    root = tmp_path_factory.mktemp("data")
    catalog = DatasetCatalog(Storage.open(str(root / "storage")), root / "cache")
    return catalog.ensure(make_text_config().data)[0]


@pytest.fixture(scope="module")
def alone(
    make_text_config: MakeConfig, text: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Record]:
    """The references: one process, whole models."""
    root = tmp_path_factory.mktemp("alone")
    jobs = {
        name: WorkerJob(make_text_config(model=model), text.directory, root / name)
        for name, model in (("tied", TIED), ("untied", UNTIED))
    }
    return run_ranks(train_all, jobs, 1)[0]


@pytest.mark.parametrize(
    ("world_size", "reference", "values"),
    [
        pytest.param(
            2, "tied", {"model": TIED, "parallelism": {"tensor": 2}}, id="tensor of two workers"
        ),
        pytest.param(
            2,
            "tied",
            {
                "model": TIED,
                "parallelism": {"pipeline": 2},
                "deepspeed": {"zero_optimization": {"stage": 0}},
            },
            id="pipeline of two workers",
        ),
        pytest.param(
            4,
            "untied",
            {
                "model": UNTIED,
                "parallelism": {"tensor": 2},
                "deepspeed": {"zero_optimization": {"stage": 2}},
            },
            id="two tensor copies",
        ),
        pytest.param(
            4, "untied", {"model": UNTIED, "parallelism": {"pipeline": 2}}, id="two pipelines"
        ),
    ],
)
def test_a_divided_model_is_trained_evaluated_resumed_and_exported_like_a_whole_one(
    alone: dict[str, Record],
    make_text_config: MakeConfig,
    text: Dataset,
    tmp_path: Path,
    world_size: int,
    reference: str,
    values: dict[str, Any],
) -> None:
    first_half = make_text_config(**values, steps=STEPS // 2)
    jobs = {
        "first half": WorkerJob(first_half, text.directory, tmp_path),
        "second half": WorkerJob(make_text_config(**values), text.directory, tmp_path),
    }
    first, second = run_ranks(train_all, jobs, world_size)[0].values()
    whole = alone[reference]
    assert sorted(whole.losses) == list(range(1, STEPS + 1))
    assert first.losses | second.losses == pytest.approx(whole.losses, rel=1e-4)
    assert second.evaluations == pytest.approx(last_step_only(whole.evaluations), rel=1e-4)
    (started,) = (event for event in second.events if isinstance(event, Started))
    assert started.first_step == STEPS // 2
    assert started.num_parameters == whole.outcome.num_parameters
    exported = second.outcome.exported.directory
    expected = whole.outcome.metrics["validation/loss"]
    assert exported_loss(exported, make_text_config(**values), text) == pytest.approx(
        expected, rel=1e-4
    )


def last_step_only(evaluations: dict[tuple[int, str], float]) -> dict[tuple[int, str], float]:
    return {key: loss for key, loss in evaluations.items() if key[0] == STEPS}


def exported_loss(directory: Path, config: TrainConfig, dataset: Dataset) -> float:
    """Validation loss of the model that anybody would load."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    family = make_family(config)
    rows = dataset.rows("validation")
    tokens = rows.read(np.arange(len(rows)))["tokens"].astype(np.int64)
    with torch.no_grad():
        sums = family.measure(model, {"tokens": torch.from_numpy(tokens)})
    return family.metrics(sums)["loss"]


OFFLOAD = {"device": "cpu"}
ZERO: dict[str, dict[str, Any]] = {
    "0": {"stage": 0},
    "1": {"stage": 1},
    "2": {"stage": 2},
    "3": {"stage": 3},
    "2, optimizer offloaded": {"stage": 2, "offload_optimizer": OFFLOAD},
    "3, optimizer and weights offloaded": {
        "stage": 3,
        "offload_optimizer": OFFLOAD,
        "offload_param": OFFLOAD,
    },
}


@pytest.fixture(scope="module")
def by_stage(
    make_text_config: MakeConfig, text: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Record]:
    """Short trainings by two workers, all in the same two processes."""
    root = tmp_path_factory.mktemp("stages")
    jobs = {
        name: WorkerJob(
            make_text_config(steps=6, deepspeed={"zero_optimization": section}),
            text.directory,
            root / str(number),
        )
        for number, (name, section) in enumerate(ZERO.items())
    }
    return run_ranks(train_all, jobs, 2)[0]


@pytest.mark.parametrize("stage", ZERO)
def test_every_zero_stage_has_the_losses_of_stage_0_and_exports(
    by_stage: dict[str, Record], make_text_config: MakeConfig, text: Dataset, stage: str
) -> None:
    record = by_stage[stage]
    assert len(record.losses) == 6
    assert record.losses == pytest.approx(by_stage["0"].losses, rel=1e-4)
    exported = record.outcome.exported.directory
    assert exported_loss(exported, make_text_config(), text) == pytest.approx(
        record.outcome.metrics["validation/loss"], rel=1e-4
    )


def test_workers_that_share_a_copy_see_the_same_rows() -> None:
    tensor, pipeline = Layout(4, tensor=2), Layout(4, pipeline=2)
    assert [tensor.copy_of(rank) for rank in range(4)] == [0, 0, 1, 1]
    assert [tensor.part_of(rank) for rank in range(4)] == [0, 1, 0, 1]
    assert [pipeline.copy_of(rank) for rank in range(4)] == [0, 1, 0, 1]
    assert [pipeline.part_of(rank) for rank in range(4)] == [0, 0, 1, 1]
    assert [Layout(2).copy_of(rank) for rank in range(2)] == [0, 1]


@pytest.mark.parametrize(
    ("values", "world_size", "message"),
    [
        (
            {"parallelism": {"tensor": 2}},
            3,
            "parallelism.tensor 2 does not divide 3 worker(s); set num_workers to 4",
        ),
        (
            {"parallelism": {"pipeline": 2}, "launcher": "local"},
            1,
            "parallelism.pipeline 2 does not divide 1 worker(s); start it with torchrun "
            "--nproc-per-node 2",
        ),
        (
            {"parallelism": {"tensor": 2, "pipeline": 2}},
            4,
            "parallelism.tensor 2 and parallelism.pipeline 2 cannot be combined; set "
            "parallelism.pipeline to 1, or parallelism.tensor to 1 and parallelism.pipeline to 4",
        ),
        (
            {"parallelism": {"tensor": 3}},
            3,
            "parallelism.tensor 3 does not divide model.num_heads 4; set parallelism.tensor to 1, "
            "or model.num_heads to 6",
        ),
        (
            {"parallelism": {"tensor": 4}, "model": UNTIED},
            4,
            "parallelism.tensor 4 does not divide model.num_key_value_heads 2; set "
            "parallelism.tensor to 2, or model.num_key_value_heads to 4",
        ),
        (
            {"parallelism": {"tensor": 4}, "model": {**TIED, "intermediate_size": 90}},
            4,
            "parallelism.tensor 4 does not divide model.intermediate_size 90; set "
            "parallelism.tensor to 2, or model.intermediate_size to 92",
        ),
        (
            {"parallelism": {"pipeline": 4}},
            4,
            "parallelism.pipeline 4 needs as many layers, and model.num_layers is 2; set "
            "parallelism.pipeline to 2 or less",
        ),
        (
            {"parallelism": {"pipeline": 2}, "model": {"family": "cnn"}},
            2,
            "model.family 'cnn' cannot be divided among workers by parallelism.pipeline, only "
            "'causal_lm' can; set parallelism.pipeline to 1; num_workers then share each batch",
        ),
        (
            {"parallelism": {"pipeline": 2}, "deepspeed": {"zero_optimization": {"stage": 2}}},
            2,
            "parallelism.pipeline cannot be combined with ZeRO stage 2; set "
            "deepspeed.zero_optimization.stage to 1",
        ),
        (
            {"parallelism": {"tensor": 2}, "deepspeed": {"zero_optimization": {"stage": 3}}},
            2,
            "parallelism.tensor cannot be combined with ZeRO stage 3; set "
            "deepspeed.zero_optimization.stage to 2",
        ),
        (
            {
                "parallelism": {"tensor": 2},
                "deepspeed": {"zero_optimization": {"stage": 1, "offload_optimizer": OFFLOAD}},
            },
            2,
            "parallelism.tensor cannot be combined with "
            "deepspeed.zero_optimization.offload_optimizer; remove offload_optimizer, or set "
            "parallelism.tensor to 1",
        ),
        (
            {"parallelism": {"pipeline": 2}, "deepspeed": {"bf16": {"enabled": True}}},
            2,
            "parallelism.pipeline cannot be combined with deepspeed.bf16; remove that section and "
            "set precision to bf16",
        ),
        (
            {"deepspeed": {"tensor_parallel": {"autotp_size": 2}}},
            2,
            "deepspeed.tensor_parallel.autotp_size is 2, and parallelism.tensor makes it 1; remove "
            "it from the deepspeed section and set parallelism.tensor",
        ),
    ],
)
def test_what_cannot_be_arranged_is_refused_with_the_nearest_choice(
    make_text_config: MakeConfig, values: dict[str, Any], world_size: int, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        arrange(make_text_config(**values, batch_size=12, micro_batch_size=1), world_size)
    assert str(caught.value) == message


def arrange(config: TrainConfig, world_size: int) -> dict[str, Any]:
    layout = Layout.of(config, world_size)
    plan = BatchPlan.make(
        batch_size=config.batch_size,
        micro_batch_size=config.micro_batch_size,
        world_size=layout.num_copies,
    )
    return make_deepspeed_config(config, plan)


@pytest.mark.parametrize("model", [TIED, UNTIED])
def test_the_estimate_counts_what_the_fullest_stage_holds(
    make_text_config: MakeConfig, model: dict[str, Any]
) -> None:
    config = make_text_config(model=model, parallelism={"pipeline": 2})
    found = estimate(config, 2)
    with torch.device("meta"):
        layers = [recipe.make() for recipe in cut(make_family(config).build())]
    sizes = [sum(weight.numel() for weight in layer.parameters()) for layer in layers]
    assert found.memory.weights == 4 * max(sum(sizes[:2]), sum(sizes[2:]))
    assert next(line for line in found.lines() if "per step" in line).endswith(
        "= 1 groups of 2 workers * 4 * 2 rows"
    )


def make_family(config: TrainConfig) -> CausalLm:
    assert isinstance(config.model, CausalLmConfig)
    return CausalLm(config.model, expected_shape(config.data))


def test_copies_of_the_model_share_a_batch(make_text_config: MakeConfig) -> None:
    made = arrange(make_text_config(parallelism={"tensor": 2}), world_size=4)
    assert made["train_batch_size"] == 8
    assert made["gradient_accumulation_steps"] == 2
    assert made["tensor_parallel"]["autotp_size"] == 2
