"""Families: what they compute, and that what they export computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

from cluster.config import parse_config
from cluster.errors import ConfigError, InputError
from cluster.processing import Processing, TensorSpec, postprocess, preprocess
from cluster.runtimes.onnx import OnnxRuntime
from cluster.storage import Storage
from jobs.data.catalog import DatasetCatalog
from jobs.data.config import DataConfig
from jobs.data.dataset import ColumnInfo, Dataset
from jobs.models.causal_lm import CausalLm
from jobs.models.cnn import Cnn
from jobs.models.config import CausalLmConfig, CnnConfig
from jobs.models.family import DataShape, Exported
from jobs.models.measures import classification_metrics
from jobs.training.loop import to_batch

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> DatasetCatalog:
    root = tmp_path_factory.mktemp("data")
    return DatasetCatalog(Storage.open(str(root / "storage")), root / "cache")


@pytest.fixture(scope="module")
def digits(catalog: DatasetCatalog) -> Dataset:
    config = DataConfig(name="digits", source={"kind": "sklearn", "dataset": "digits"})
    return catalog.ensure(config)[0]


@pytest.fixture(scope="module")
def text(catalog: DatasetCatalog, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text("The sun turns, 定日镜 follows.\n" * 200, encoding="utf-8")
    config = DataConfig(
        name="text",
        source={"kind": "text", "paths": [str(path)]},
        splits={"by": "position"},
        text={"tokenizer": {"kind": "bpe", "vocab_size": 300}, "sequence_length": 8},
    )
    return catalog.ensure(config)[0]


class Described:
    """An exported graph, as processing sees it."""

    def __init__(self, exported: Exported) -> None:
        self.runtime = OnnxRuntime(exported.directory / "model.onnx")
        self.inputs: tuple[TensorSpec, ...] = self.runtime.inputs
        self.outputs: tuple[TensorSpec, ...] = self.runtime.outputs
        self.processing: Processing = exported.processing

    def answer(self, **inputs: Any) -> dict[str, Any]:
        return postprocess(self, self.runtime.run(preprocess(self, inputs)))


def test_an_exported_cnn_answers_as_torch_does(digits: Dataset, tmp_path: Path) -> None:
    torch.manual_seed(0)
    family = Cnn(CnnConfig(family="cnn", channels=(4,)), DataShape.of(digits.info))
    model = family.build().eval()
    described = Described(family.export(model, digits, tmp_path))
    for num_rows in (1, 5):
        rows = digits.rows("test").read(np.arange(num_rows))
        with torch.no_grad():
            logits = model(torch.from_numpy(rows["pixels"]).unsqueeze(1) / 16)
        found = described.answer(pixels=rows["pixels"].reshape(num_rows, 64))
        assert np.allclose(found["logits"], logits, atol=1e-4)
        assert np.allclose(found["probabilities"], logits.softmax(-1), atol=1e-5)
        assert [int(label) for label in found["label"]] == logits.argmax(-1).tolist()


def test_a_cnn_measures_what_scikit_learn_measures(digits: Dataset) -> None:
    family = Cnn(CnnConfig(family="cnn", channels=(4,)), DataShape.of(digits.info))
    model = family.build().eval()
    rows = digits.rows("test").read(np.arange(100))
    batch = to_batch(rows, CPU)
    with torch.no_grad():
        found = family.metrics(family.measure(model, batch))
        predicted = model(batch["pixels"].unsqueeze(1) / 16).argmax(-1).numpy()
        loss = family.loss(model, batch) / family.num_units(batch)
    precision, recall, f1, _ = precision_recall_fscore_support(
        rows["label"], predicted, average="macro", zero_division=0, labels=range(10)
    )
    assert found == pytest.approx(
        {
            "loss": float(loss),
            "accuracy": accuracy_score(rows["label"], predicted),
            "precision": precision,
            "recall": recall,
            "f1": f1,
        },
        abs=1e-5,
    )


def test_perfect_predictions_have_perfect_metrics() -> None:
    assert set(classification_metrics(torch.eye(3) * 5).values()) == {1.0}


def test_a_language_model_predicts_every_token_but_the_first(text: Dataset) -> None:
    config = CausalLmConfig(family="causal_lm", hidden_size=16, num_layers=1, num_heads=2)
    family = CausalLm(config, DataShape.of(text.info))
    model = family.build().eval()
    rows = text.rows("train").read(np.arange(3))
    batch = to_batch(rows, CPU)
    with torch.no_grad():
        sums = family.measure(model, batch)
        loss = family.loss(model, batch) / family.num_units(batch)
        # transformers' own shifted loss over the same row is the reference.
        reference = model(input_ids=batch["tokens"], labels=batch["tokens"]).loss
    assert sums[2] == 3 * 8
    assert float(sums[0] / sums[2]) == pytest.approx(float(loss), rel=1e-5)
    assert float(loss) == pytest.approx(float(reference), rel=1e-4)


def test_an_exported_language_model_is_a_plain_hugging_face_directory(
    text: Dataset, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    config = CausalLmConfig(
        family="causal_lm", hidden_size=16, num_layers=1, num_heads=2, max_context_tokens=64
    )
    family = CausalLm(config, DataShape.of(text.info))
    model = family.build().eval()
    exported = family.export(model, text, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32").eval()
    ids = tokenizer("定日镜 follows", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, loaded(ids).logits, atol=1e-5)
    assert tokenizer.decode(ids[0]) == "定日镜 follows"
    assert loaded.config.max_position_embeddings == 64
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id == 0
    assert loaded.config.use_cache
    assert len(exported.golden_inputs) == 2
    assert not list(tmp_path.glob("*.bin"))


def test_images_are_required_by_a_cnn() -> None:
    shape = DataShape(columns={"tokens": ColumnInfo(dtype="uint16", shape=(9,))})
    with pytest.raises(InputError, match=r"needs a column 'pixels'.*the data has: tokens"):
        Cnn(CnnConfig(family="cnn"), shape)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": 30}, r"multiple of 2 \* num_heads = 16"),
        ({"num_key_value_heads": 3}, "num_heads 8 must be a multiple of num_key_value_heads 3"),
    ],
)
def test_heads_that_do_not_divide_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config({"family": "causal_lm", **values}, CausalLmConfig, source="model")
