"""The profile of every kind of data: what serving will see of the same data is no drift."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.processing import Processing, preprocess
from cluster.runtimes.onnx import OnnxRuntime
from cluster.statistics.drift import DriftWindow, measure
from cluster.statistics.features import input_features, text_features
from cluster.statistics.profile import Categories, Numbers, Tokens, read_profile
from cluster.storage import Storage
from jobs.data.catalog import DatasetCatalog
from jobs.data.config import DataConfig
from jobs.data.dataset import Dataset
from jobs.data.packing import ChatPacker
from jobs.models.cnn import Cnn
from jobs.models.config import CnnConfig, LinearRegressionConfig
from jobs.models.families import make_family
from jobs.models.family import DataShape, Exported
from jobs.training.profile import data_profile, document_lengths, kept_tokens


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> DatasetCatalog:
    root = tmp_path_factory.mktemp("data")
    return DatasetCatalog(Storage.open(str(root / "storage")), root / "cache")


def text_export(directory: Path) -> Exported:
    return Exported("language_model", directory, [], Processing())


def profile_of(dataset: Dataset, exported: Exported) -> Any:
    profile = read_profile(data_profile(dataset, exported))
    assert profile is not None
    return profile


def test_pictures_by_pixel_and_answers_by_class_and_score(
    catalog: DatasetCatalog, tmp_path: Path
) -> None:
    config = DataConfig(name="digits", source={"kind": "sklearn", "dataset": "digits"})
    dataset = catalog.ensure(config)[0]
    torch.manual_seed(0)
    family = Cnn(CnnConfig(family="cnn", channels=(2,), hidden_size=8), DataShape.of(dataset.info))
    exported = family.export(family.build().eval(), dataset, tmp_path)
    profile = profile_of(dataset, exported)
    assert len(profile.inputs) == 64
    assert sum(profile.inputs["pixels[20]"].counts) == len(dataset.rows("train"))
    label, score = profile.outputs["label"], profile.outputs["probabilities.max"]
    assert isinstance(label, Categories)
    assert isinstance(score, Numbers)
    assert sum(label.counts) == sum(score.counts) == len(dataset.rows("validation"))

    runtime = OnnxRuntime(tmp_path / "model.onnx")
    rows = dataset.rows("test").read(np.arange(len(dataset.rows("test"))))

    def drift(pixels: Any) -> float:
        class Described:
            inputs, outputs, processing = runtime.inputs, runtime.outputs, exported.processing

        taken = preprocess(Described(), {"pixels": pixels.reshape(-1, 64)})
        window = DriftWindow(profile, half_life_rows=10_000)
        window.add("inputs", input_features(taken), num_rows=len(pixels))
        found = measure(profile, window.counts)["inputs"].values()
        return max(feature.psi for feature in found)

    assert drift(rows["pixels"]) < 0.25 * 4  # 180 rows of 64 pixels: noise, not yet an alarm
    assert drift(16 - rows["pixels"]) > 4


def test_tables_by_the_names_of_their_features(catalog: DatasetCatalog, tmp_path: Path) -> None:
    config = DataConfig(name="diabetes", source={"kind": "sklearn", "dataset": "diabetes"})
    dataset = catalog.ensure(config)[0]
    family = make_family(
        LinearRegressionConfig(family="linear_regression"), DataShape.of(dataset.info)
    )
    exported = family.export(family.build().eval(), dataset, tmp_path)
    profile = profile_of(dataset, exported)
    assert dataset.info.table is not None
    assert set(profile.inputs) == set(dataset.info.table.feature_names)
    assert list(profile.outputs) == ["prediction"]


def test_text_by_length_and_tokens(catalog: DatasetCatalog, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "The sun turns, and the mirror follows."}\n' * 300, encoding="utf-8")
    config = DataConfig(
        name="text",
        source={"kind": "text", "paths": [str(path)]},
        splits={"by": "position"},
        text={"tokenizer": {"kind": "characters"}, "sequence_length": 64},
    )
    dataset = catalog.ensure(config)[0]
    profile = profile_of(dataset, text_export(tmp_path))
    tokens = profile.inputs["tokens"]
    assert isinstance(tokens, Tokens)
    rows = dataset.rows("train").read(np.arange(len(dataset.rows("train"))))
    assert sum(tokens.counts) == rows["tokens"][:, :-1].size, "what two rows share counts once"

    window = DriftWindow(profile, half_life_rows=1000)
    window.add("inputs", text_features(list(rows["tokens"][:, :-1])), num_rows=1)
    assert measure(profile, window.counts)["inputs"]["tokens"].psi < 1e-6
    assert sum(profile.outputs["tokens"].counts) > 0


def test_what_fills_the_rows_of_conversations_up_is_not_counted() -> None:
    packer = ChatPacker(sequence_length=7, dtype=np.uint16, pad_id=0)
    tokens, lengths = np.arange(1, 13), np.array([3, 4, 5])
    packer.add(tokens, np.ones(12, np.uint8), lengths)
    columns = packer.finish()
    kept = kept_tokens(columns, pad_id=0)
    assert sorted(columns["tokens"][kept]) == sorted(tokens)
    assert sorted(document_lengths(columns, kept).tolist()) == [3, 4, 5]
