"""A step's gradient is that of the mean over the global batch, however it is shared out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jobs.data.dataset import ColumnInfo
from jobs.data.rows import Array, Rows, write_rows
from jobs.data.sampler import global_batch
from jobs.data.table_info import FEATURES, LABEL, TARGET, TableInfo
from jobs.models.families import make_family
from jobs.models.family import DataShape
from jobs.models.weighting import LOSS_MASK, ROW_WEIGHT
from jobs.training.batching import BatchPlan
from jobs.training.config import TrainConfig
from jobs.training.deepspeed_config import make_deepspeed_config
from jobs.training.deepspeed_setup import start_deepspeed
from jobs.training.loop import Feed, to_batch, train_steps
from jobs.training.parallelism import Layout
from jobs.training.process_group import start_process_group
from tests.unit.jobs.training.conftest import MakeConfig
from tests.unit.jobs.training.ranks import run_ranks

NUM_ROWS, BATCH_SIZE, STEPS, RATE = 24, 8, 3, 0.2
VOCAB_SIZE, NUM_TOKENS = 40, 12

TABLE = TableInfo(
    feature_names=("a", "b", "c"),
    target_name="target",
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    missing="refuse",
    outliers="keep",
)
SHAPES = {
    "text": DataShape(columns={}, vocab_size=VOCAB_SIZE, sequence_length=NUM_TOKENS),
    "images": DataShape(
        columns={
            "pixels": ColumnInfo(dtype="float32", shape=(4, 4)),
            "label": ColumnInfo(dtype="int64", shape=()),
        },
        class_names=("x", "y", "z"),
    ),
    "numbers": DataShape(columns={}, table=TABLE),
    "classes": DataShape(columns={}, class_names=("x", "y"), table=TABLE),
}
MODELS: dict[str, dict[str, Any]] = {
    "text": {"family": "causal_lm", "hidden_size": 16, "num_layers": 2, "num_heads": 2},
    "images": {"family": "cnn", "channels": [2], "hidden_size": 4, "dropout": 0.0},
    "numbers": {"family": "linear_regression"},
    "classes": {"family": "mlp", "hidden_sizes": [4]},
}


@dataclass(frozen=True)
class Case:
    """A training of some rows, kept in a file."""

    config: TrainConfig
    shape: DataShape
    rows: Path


@dataclass(frozen=True)
class Trained:
    losses: list[float]
    weights: Array
    norms: list[float | None]


def make_columns(kind: str) -> dict[str, Array]:
    """Rows of which no two count alike; some count for nothing, or predict nothing."""
    random = np.random.default_rng(0)
    weight = random.choice([0.0, 1.0, 2.5], size=NUM_ROWS).astype(np.float32)
    number = random.normal(size=NUM_ROWS).astype(np.float32)
    of_kind: dict[str, dict[str, Array]] = {
        "text": {
            "tokens": random.integers(VOCAB_SIZE, size=(NUM_ROWS, NUM_TOKENS + 1)).astype("uint16"),
            LOSS_MASK: np.packbits(
                np.arange(NUM_TOKENS + 1) < random.integers(14, size=(NUM_ROWS, 1)), axis=1
            ),
        },
        "images": {
            "pixels": random.random((NUM_ROWS, 4, 4)).astype(np.float32) * 16,
            "label": random.integers(3, size=NUM_ROWS),
        },
        "numbers": {FEATURES: random.random((NUM_ROWS, 3)).astype(np.float32), TARGET: number},
        "classes": {
            FEATURES: random.random((NUM_ROWS, 3)).astype(np.float32),
            LABEL: random.integers(2, size=NUM_ROWS),
        },
    }
    return {**of_kind[kind], ROW_WEIGHT: weight}


def train_all(cases: dict[str, Case]) -> dict[str, Trained]:
    return {name: train(case) for name, case in cases.items()}


def train(case: Case) -> Trained:
    config, group = case.config, start_process_group()
    layout = Layout.of(config, group.world_size)
    plan = BatchPlan.make(
        batch_size=config.batch_size,
        micro_batch_size=config.micro_batch_size,
        world_size=layout.num_copies,
    )
    family = make_family(config.model, case.shape)
    torch.manual_seed(0)
    engine = start_deepspeed(
        family.build(), family, config, make_deepspeed_config(config, plan), group, layout
    )
    feed = Feed(Rows.open(case.rows), plan, config.seed, group, layout)
    steps = list(train_steps(engine, family, feed, config, first_step=0))
    with engine.whole_model() as model:
        return Trained(
            [step.loss for step in steps],
            fingerprint(model),
            [step.gradient_norm for step in steps],
        )


def train_plainly(case: Case) -> Trained:
    """Torch alone, with the whole batch at once."""
    config, rows = case.config, Rows.open(case.rows)
    family = make_family(config.model, case.shape)
    torch.manual_seed(0)
    model = family.build()
    losses, norms = [], []
    for step in range(STEPS):
        ids = global_batch(num_rows=len(rows), batch_size=BATCH_SIZE, seed=config.seed, step=step)
        batch = to_batch(rows.read(ids), torch.device("cpu"))
        loss = family.loss(model, batch) / family.num_units(batch)
        model.zero_grad()
        loss.backward()
        gradients = [weight.grad.flatten() for weight in model.parameters()]
        norms.append(float(torch.cat(gradients).norm()))
        with torch.no_grad():
            for weight in model.parameters():
                weight -= RATE * weight.grad
        losses.append(float(loss.detach()))
    return Trained(losses, fingerprint(model), [*norms])


def fingerprint(model: torch.nn.Module) -> Array:
    """A few random projections of all weights: less to send between processes."""
    weights = torch.cat([weight.detach().float().cpu().flatten() for weight in model.parameters()])
    directions = torch.randn(16, len(weights), generator=torch.Generator().manual_seed(0))
    return (directions @ weights).numpy()


@pytest.fixture(scope="module")
def make_case(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("rows")
    for kind in MODELS:
        write_rows(root / kind, make_columns(kind))
        plain = {k: v for k, v in make_columns(kind).items() if k not in (ROW_WEIGHT, LOSS_MASK)}
        write_rows(root / f"{kind} unweighted", plain)

    def make(kind: str, *, weighted: bool = True, **values: Any) -> Case:
        config = make_config(
            model=MODELS[kind],
            optimizer={"name": "sgd", "learning_rate": RATE, "momentum": 0.0},
            schedule={"kind": "constant"},
            # Without ZeRO the norm is computed only where it is needed.
            gradient_clipping=1e6,
            steps=STEPS,
            batch_size=BATCH_SIZE,
            **values,
        )
        return Case(config, SHAPES[kind], root / (kind if weighted else f"{kind} unweighted"))

    return make


@pytest.fixture(scope="module")
def cases(make_case: Any) -> dict[str, Case]:
    zero_0, zero_3 = ({"zero_optimization": {"stage": stage}} for stage in (0, 3))
    return {
        **{f"{kind}, whole shares": make_case(kind) for kind in MODELS},
        **{f"{kind}, micro-batches": make_case(kind, micro_batch_size=1) for kind in MODELS},
        **{f"{kind}, unweighted": make_case(kind, weighted=False) for kind in MODELS},
        "text, ZeRO 0": make_case("text", micro_batch_size=2, deepspeed=zero_0),
        "text, ZeRO 3": make_case("text", micro_batch_size=2, deepspeed=zero_3),
        "text, tensor": make_case("text", micro_batch_size=2, parallelism={"tensor": 2}),
        "text, pipeline": make_case("text", micro_batch_size=2, parallelism={"pipeline": 2}),
    }


@pytest.mark.parametrize("world_size", [1, 2])
def test_workers_and_micro_batches_of_unequal_weight_train_like_one_process(
    cases: dict[str, Case], world_size: int
) -> None:
    of_workers = {
        name: case
        for name, case in cases.items()
        if world_size > 1 or max(case.config.parallelism.model_dump().values()) == 1
    }
    every_worker = run_ranks(train_all, of_workers, world_size)
    for name, case in of_workers.items():
        expected = train_plainly(case)
        found = every_worker[0][name]
        assert found.losses == pytest.approx(expected.losses, rel=1e-5), name
        assert np.allclose(found.weights, expected.weights, atol=1e-5), name
        assert found.norms == pytest.approx(expected.norms, rel=1e-3), name
        # The mean over all is known to all.
        assert all(worker[name].losses == found.losses for worker in every_worker), name
