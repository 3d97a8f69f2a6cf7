"""Families of tables: what they export answers as training measured, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.config import parse_config
from cluster.errors import InputError
from cluster.model_package import (
    LocalSigner,
    TrustStore,
    ensure_local_key,
    golden,
    open_package,
    write_package,
)
from cluster.storage import Storage
from jobs.data.catalog import DatasetCatalog
from jobs.data.config import DataConfig
from jobs.data.dataset import ColumnInfo, Dataset
from jobs.evaluation.config import EvaluateConfig
from jobs.evaluation.graph import evaluate_graph
from jobs.models.config import LinearRegressionConfig, LogisticRegressionConfig, MlpConfig
from jobs.models.families import make_family
from jobs.models.family import DataShape
from jobs.training.loop import to_batch
from jobs.training.profile import data_profile

LINEAR = LinearRegressionConfig(family="linear_regression")
LOGISTIC = LogisticRegressionConfig(family="logistic_regression")
MLP = MlpConfig(family="mlp", hidden_sizes=(8, 4), dropout=0.5)


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> DatasetCatalog:
    root = tmp_path_factory.mktemp("data")
    return DatasetCatalog(Storage.open(str(root / "storage")), root / "cache")


def prepare(catalog: DatasetCatalog, name: str, **values: Any) -> Dataset:
    source = {"kind": "sklearn", "dataset": name}
    config = parse_config({"name": name, "source": source, **values}, DataConfig, source="test")
    return catalog.ensure(config)[0]


@pytest.mark.parametrize(
    ("config", "dataset_name", "outputs"),
    [
        (LINEAR, "diabetes", {"prediction"}),
        (MLP, "diabetes", {"prediction"}),
        (LOGISTIC, "wine", {"logits", "label", "probabilities"}),
    ],
    ids=lambda value: getattr(value, "family", None),
)
def test_a_package_answers_raw_features_as_training_measured_them(
    catalog: DatasetCatalog, tmp_path: Path, config: Any, dataset_name: str, outputs: set[str]
) -> None:
    dataset = prepare(catalog, dataset_name)
    torch.manual_seed(0)
    family = make_family(config, DataShape.of(dataset.info))
    model = family.build().eval()
    rows = dataset.rows("test")
    batch = to_batch(rows.read(np.arange(len(rows))), torch.device("cpu"))
    with torch.no_grad():
        expected = family.metrics(family.measure(model, batch))
    assert tuple(expected) == family.metric_names

    (tmp_path / "model").mkdir()
    exported = family.export(model, dataset, tmp_path / "model")
    ensure_local_key(tmp_path / "keys")
    storage = Storage.open(str(tmp_path / "storage"))
    published = write_package(
        exported.directory,
        name="m",
        kind=exported.kind,
        storage=storage,
        signer=LocalSigner(tmp_path / "keys"),
        processing=exported.processing,
        golden_inputs=exported.golden_inputs,
        profile=data_profile(dataset, exported),
    )
    package = open_package(
        published.digest,
        storage=storage,
        trust=TrustStore(tmp_path / "keys"),
        cache_dir=tmp_path / "cache",
    )
    golden.replay(package)
    assert set(package.manifest.golden.outputs) == outputs
    found = evaluate_graph(package, dataset, EvaluateConfig(model="m", batch_size=7)).metrics
    both = found.keys() & expected.keys()
    assert both == expected.keys() - {"loss"}
    assert {name: found[name] for name in both} == pytest.approx(
        {name: expected[name] for name in both}, rel=1e-4
    )
    assert package.manifest.profile["feature_names"] == list(dataset.info.table.feature_names)  # type: ignore[union-attr]

    names = dataset.info.table.feature_names  # type: ignore[union-attr]
    turned = prepare(catalog, dataset_name, table={"features": [*names[1:], names[0]]})
    with pytest.raises(InputError, match=r"the model takes .*data\.table\.features"):
        evaluate_graph(package, turned, EvaluateConfig(model="m"))


def test_dropout_is_for_training_only(catalog: DatasetCatalog) -> None:
    dataset = prepare(catalog, "wine")
    model = make_family(MLP, DataShape.of(dataset.info)).build()
    inputs = torch.ones(4, 13)
    assert not torch.equal(model.train()(inputs), model(inputs))
    assert torch.equal(model.eval()(inputs), model(inputs))


@pytest.mark.parametrize(
    ("config", "dataset_name", "message"),
    [
        (LINEAR, "wine", "predicts numbers, and target 'target' is a class.*logistic_regression"),
        (LOGISTIC, "diabetes", "predicts classes, and target 'target' is a number.*linear"),
        (MLP, "digits", "'mlp' needs a table, and the data has: label, pixels"),
    ],
)
def test_data_that_does_not_suit_a_family_is_refused(
    catalog: DatasetCatalog, config: Any, dataset_name: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        make_family(config, DataShape.of(prepare(catalog, dataset_name).info))


def test_text_is_no_table() -> None:
    shape = DataShape(columns={"tokens": ColumnInfo(dtype="uint16", shape=(9,))})
    with pytest.raises(InputError, match="needs a table, and the data has: tokens"):
        make_family(LINEAR, shape)
