"""What makes training faster leaves its losses as they are, or is refused."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.errors import ConfigError, MissingToolError
from cluster.storage import Storage
from jobs.data.catalog import DatasetCatalog
from jobs.data.dataset import Dataset
from jobs.models.families import make_family
from jobs.models.family import DataShape
from jobs.training import compiling
from jobs.training.batching import BatchPlan
from jobs.training.config import TrainConfig
from jobs.training.deepspeed_config import make_deepspeed_config
from jobs.training.deepspeed_section import zero_stage
from jobs.training.deepspeed_setup import start_deepspeed
from jobs.training.loop import Feed, train_steps
from jobs.training.parallelism import Layout
from jobs.training.process_group import start_process_group
from jobs.training.toolchain import require_torch_compiler
from jobs.training.worker import WorkerJob
from tests.unit.jobs.training.conftest import MakeConfig
from tests.unit.jobs.training.ranks import run_ranks

MODEL: dict[str, Any] = {
    "family": "causal_lm",
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    # Three chunks, the last one smaller.
    "loss_chunk_tokens": 25,
}
SPARSE = {"family": "causal_lm", "base": "demo", "keep_zeros": True}
TAUGHT = {**MODEL, "distillation": {"teacher": "demo"}}
MASKED = {**MODEL, "mask_documents": True}
CHECKPOINTED = {"activation_checkpointing": True}
COMPILED = {"compile": True}
MUON = {"optimizer": {"name": "muon", "learning_rate": 5e-3}}
BF16 = {"precision": "bf16"}

# Name → the one it must equal, ZeRO stage, values.
VARIANTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "plain": ("plain", 0, {}),
    "all logits": ("plain", 1, {"model": {**MODEL, "loss_chunk_tokens": 0}}),
    "sharded": ("plain", 3, {}),
    "checkpointed": ("plain", 1, CHECKPOINTED),
    "checkpointed, sharded": ("plain", 3, CHECKPOINTED),
    "compiled": ("plain", 0, COMPILED),
    "masked": ("masked", 1, {"model": MASKED}),
    "masked, sharded": ("masked", 3, {"model": MASKED}),
    "muon": ("muon", 0, MUON),
    "muon, all logits": ("muon", 0, {**MUON, "model": {**MODEL, "loss_chunk_tokens": 0}}),
    "bf16": ("bf16", 1, BF16),
    "bf16, masked": ("bf16, masked", 1, {**BF16, "model": MASKED}),
    "bf16, masked, compiled, checkpointed": (
        "bf16, masked",
        2,
        {**BF16, **COMPILED, **CHECKPOINTED, "model": MASKED},
    ),
    "bf16 weights": ("bf16", 1, {"deepspeed": {"bf16": {"enabled": True}}}),
    "muon, masked": ("muon, masked", 0, {**MUON, "model": MASKED}),
    "muon, masked, compiled, checkpointed": (
        "muon, masked",
        0,
        {**MUON, **COMPILED, **CHECKPOINTED, "model": MASKED},
    ),
    "muon, bf16": ("muon, bf16", 0, {**MUON, **BF16}),
    # The table in docs/training.md: each option at each ZeRO stage that takes it.
    **{
        f"{name} at ZeRO {stage}": (reference, stage, values)
        for name, (reference, values, stages) in {
            "plain": ("plain", {}, (1, 2)),
            "checkpointed": ("plain", CHECKPOINTED, (0, 2)),
            "masked": ("masked", {"model": MASKED}, (0, 2)),
            "bf16": ("bf16", BF16, (0, 2, 3)),
            "compiled": ("plain", COMPILED, (1, 2)),
        }.items()
        for stage in stages
    },
}


def losses_of_all(jobs: dict[str, WorkerJob]) -> dict[str, list[float]]:
    """The first steps of one training after the other, in the same processes."""
    torch.set_num_threads(1)
    # What torch.compile traces, without the C++ that it would write and have compiled: see the
    # soak test below.
    compiling.BACKEND = "aot_eager"
    return {name: first_losses(job) for name, job in jobs.items()}


def losses_in_cpp(jobs: dict[str, WorkerJob]) -> dict[str, list[float]]:
    torch.set_num_threads(1)
    return {name: first_losses(job) for name, job in jobs.items()}


def first_losses(job: WorkerJob) -> list[float]:
    config, group = job.config, start_process_group()
    if config.compile and job.compiled_dir is not None:
        compiling.keep_compiled(job.compiled_dir)
    dataset = Dataset.open(job.dataset_dir)
    layout = Layout.of(config, group.world_size)
    plan = BatchPlan.make(
        batch_size=config.batch_size, micro_batch_size=4, world_size=group.world_size
    )
    family = make_family(config.model, DataShape.of(dataset.info))
    torch.manual_seed(0)
    engine = start_deepspeed(
        family.build(), family, config, make_deepspeed_config(config, plan), group, layout
    )
    feed = Feed(dataset.rows("train"), plan, config.seed, group, layout)
    steps = train_steps(engine, family, feed, config, first_step=0)
    return [step.loss for step in steps]


@pytest.fixture(scope="module")
def make_text_config(
    make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory
) -> MakeConfig:
    directory = tmp_path_factory.mktemp("text")
    for number in range(40):
        text = "".join(f"{n} squared is {n * n}\n" for n in range(number, 2 * number + 1))
        (directory / f"{number}.txt").write_text(text, encoding="utf-8")

    def make(**values: Any) -> TrainConfig:
        defaults: dict[str, Any] = {
            "data": {
                "name": "text",
                "source": {"kind": "text", "paths": [str(directory / "*.txt")]},
                "text": {
                    "tokenizer": {"kind": "bpe", "vocab_size": 300},
                    "sequence_length": 16,
                },
            },
            "model": MODEL,
            "optimizer": {"learning_rate": 5e-3},
            "schedule": {"kind": "constant"},
            "steps": 4,
            "micro_batch_size": 4,
        }
        return make_config(**{**defaults, **values})

    return make


def make_jobs(make_config: MakeConfig, names: Iterable[str], root: Path) -> dict[str, WorkerJob]:
    catalog = DatasetCatalog(Storage.open(str(root / "storage")), root / "cache")
    dataset, _ = catalog.ensure(make_config().data)
    jobs = {}
    for name in names:
        _, stage, values = VARIANTS[name]
        raw = {**values.get("deepspeed", {}), "zero_optimization": {"stage": stage}}
        config = make_config(**{**values, "deepspeed": raw})
        jobs[name] = WorkerJob(config, dataset.directory, root / name, root / "compiled")
    return jobs


def check_losses(losses: dict[str, list[float]]) -> None:
    for name in losses:
        reference, _, _ = VARIANTS[name]
        tolerance = 2e-2 if "bf16" in name else 1e-4
        assert losses[name] == pytest.approx(losses[reference], rel=tolerance), name
        assert losses[name][-1] < losses[name][0], name


@pytest.mark.timeout(600)
def test_each_option_on_two_workers_has_the_losses_of_none(
    make_text_config: MakeConfig, tmp_path: Path
) -> None:
    losses, _ = run_ranks(losses_of_all, make_jobs(make_text_config, VARIANTS, tmp_path), 2)
    check_losses(losses)
    assert losses["masked"] != pytest.approx(losses["plain"], rel=1e-4)


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_compiled_to_cpp_the_losses_are_the_same_and_the_code_is_kept(
    make_text_config: MakeConfig, tmp_path: Path
) -> None:
    names = [
        name
        for name, (reference, _, values) in VARIANTS.items()
        if name == reference or "compile" in values
    ]
    losses, _ = run_ranks(losses_in_cpp, make_jobs(make_text_config, names, tmp_path), 2)
    check_losses(losses)
    assert any((tmp_path / "compiled").rglob("*.so"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({**MUON, "zero": 1}, r"'muon' needs whole matrices.*stage to 0, or .* adamw"),
        ({**MUON, "zero": 3}, r"'muon' needs whole matrices.*stage to 0"),
        ({**MUON, "parallelism": {"tensor": 2}}, r"'muon' .* parallelism\.tensor"),
        ({**MUON, "deepspeed": {"bf16": {"enabled": True}}}, r"'muon' .*deepspeed\.bf16"),
        ({**COMPILED, "zero": 3}, r"compile .* ZeRO stage 3.*stage to 2"),
        ({**COMPILED, "parallelism": {"pipeline": 2}}, r"compile .* parallelism\.pipeline"),
        ({"model": MASKED, "parallelism": {"pipeline": 2}}, r"mask_documents .*pipeline"),
        ({"model": MASKED, "parallelism": {"tensor": 2}}, r"mask_documents .*tensor"),
        ({**CHECKPOINTED, "parallelism": {"tensor": 2}}, r"activation_checkpointing .*tensor"),
        ({**MUON, "model": SPARSE}, r"keep_zeros .* 'muon'.*adamw"),
        ({"model": SPARSE, "zero": 3}, r"keep_zeros .* ZeRO stage 3.*stage to 2"),
        ({"model": SPARSE, "parallelism": {"tensor": 2}}, r"keep_zeros .*tensor"),
        ({"model": TAUGHT, "parallelism": {"pipeline": 2}}, r"distillation .*pipeline"),
        ({**CHECKPOINTED, "model": {"family": "cnn"}}, r"activation_checkpointing .* 'cnn'"),
    ],
)
def test_what_does_not_work_is_refused_with_what_does(
    make_text_config: MakeConfig, values: dict[str, Any], message: str
) -> None:
    values = dict(values)
    if "zero" in values:
        values["deepspeed"] = {"zero_optimization": {"stage": values.pop("zero")}}
    with pytest.raises(ConfigError, match=message):
        settled(make_text_config(**values))


def test_muon_takes_zero_stage_0_unless_told_otherwise(make_text_config: MakeConfig) -> None:
    assert zero_stage(settled(make_text_config(**MUON))) == 0
    assert zero_stage(settled(make_text_config())) == 1


def test_a_missing_compiler_is_named() -> None:
    with pytest.raises(MissingToolError, match=r"compile is true.*apt-get install -y g\+\+"):
        require_torch_compiler(which=lambda name: None)


def settled(config: TrainConfig) -> dict[str, Any]:
    plan = BatchPlan.make(batch_size=config.batch_size, micro_batch_size=4, world_size=2)
    return make_deepspeed_config(config, plan)
