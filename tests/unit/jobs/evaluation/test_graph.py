"""A graph's answers are held against the data; what cannot be is one line that says what to set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cluster.config import parse_config
from cluster.errors import InputError
from cluster.model_package import (
    LocalSigner,
    ModelPackage,
    ensure_local_key,
    open_digest,
    write_package,
)
from cluster.settings import Settings
from cluster.storage import Storage
from jobs.data.config import DataConfig
from jobs.data.dataset import Dataset
from jobs.evaluation.config import EvaluateConfig
from jobs.evaluation.evaluation import row_slices
from jobs.evaluation.graph import evaluate_graph
from jobs.prepare import open_catalog

CONFIG = EvaluateConfig(model="m", split="test")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    home = tmp_path_factory.mktemp("home")
    ensure_local_key(home / "keys")
    return Settings(home=home)


def prepare(settings: Settings, name: str, lines: list[str], **source: str) -> Dataset:
    path = settings.home / f"{name}.csv"
    path.write_text("\n".join(lines))
    values = {
        "name": name,
        "source": {"kind": "table", "path": str(path), "target": "y", **source},
        "splits": {"test": 0.5, "validation": 0.05},
    }
    dataset, _ = open_catalog(settings).ensure(parse_config(values, DataConfig, source="test"))
    return dataset


@pytest.fixture(scope="module")
def sums(settings: Settings) -> Dataset:
    """Feature `a` is 0 mostly, and else close to 1000."""
    values = [(0.0 if n % 4 else 1000 + n / 1000, n % 5) for n in range(200)]
    lines = ["a,b,y", *(f"{a},{b},{a + b}" for a, b in values)]
    return prepare(settings, "sums", lines, task="regression")


@pytest.fixture(scope="module")
def classes(settings: Settings) -> Dataset:
    lines = ["a,b,y", *(f"{n % 9},{n % 5},{'odd' if n % 2 else 'even'}" for n in range(200))]
    return prepare(settings, "classes", lines, task="classification")


Publish = Callable[..., ModelPackage]


@pytest.fixture
def publish(settings: Settings, tmp_path: Path) -> Publish:
    """A package of one matrix, [2, width], whose answers are also given as text, in `words`."""

    def publish(weights: Any, output: str = "prediction") -> ModelPackage:
        matrix = np.array(weights, dtype=np.float32)
        graph = helper.make_graph(
            [
                helper.make_node("MatMul", ["features", "W"], [output]),
                helper.make_node("Cast", [output], ["words"], to=TensorProto.STRING),
            ],
            "g",
            [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", 2])],
            [
                helper.make_tensor_value_info(output, TensorProto.FLOAT, ["n", matrix.shape[1]]),
                helper.make_tensor_value_info("words", TensorProto.STRING, ["n", matrix.shape[1]]),
            ],
            [numpy_helper.from_array(matrix, "W")],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.save(model, tmp_path / "model.onnx")
        published = write_package(
            tmp_path,
            name="m",
            kind="graph",
            storage=Storage.open(settings.storage_root),
            signer=LocalSigner(settings.keys_dir),
        )
        return open_digest(published.digest, settings)

    return publish


def config(**changes: Any) -> EvaluateConfig:
    return CONFIG.model_copy(update=changes)


def test_a_regression_is_measured_and_sliced(sums: Dataset, publish: Publish) -> None:
    found = evaluate_graph(publish([[1], [2]]), sums, config(slice_by="b"))
    assert found.slices.keys() == {f"b={n}" for n in range(5)}
    for n in range(5):
        assert found.slices[f"b={n}"]["mae"] == pytest.approx(n, abs=1e-3)
    rows = sum(part["num_rows"] for part in found.slices.values())
    assert rows == len(found.row_values["mae"]) == sums.info.num_rows["test"]
    assert found.figures.keys() == {"residuals.png"}


def test_the_quarters_of_a_skewed_range_are_told_apart_and_hold_every_row(sums: Dataset) -> None:
    slices = row_slices(sums, "test", "a")
    assert all(mask.any() for mask in slices.values())
    assert sum(int(mask.sum()) for mask in slices.values()) == sums.info.num_rows["test"]
    nearly_equal = row_slices(sums, "test", "target")
    assert sum(int(mask.sum()) for mask in nearly_equal.values()) == sums.info.num_rows["test"]


def test_only_the_label_is_shown_by_class_names(classes: Dataset) -> None:
    assert row_slices(classes, "test", "label").keys() == {"label=even", "label=odd"}
    assert row_slices(classes, "test", "b").keys() == {f"b={n}" for n in range(5)}


@pytest.mark.parametrize(
    ("weights", "changes", "message"),
    [
        ([[np.nan], [1]], {}, "the model's 'prediction' of row 0 is no finite number"),
        ([[1, 1], [1, 1]], {}, "'prediction' has 2 values per row, expected one; set output"),
        ([[1], [1]], {"label": "features"}, "'features' has 2 values per row, expected one"),
        ([[1], [1]], {"output": "words"}, "words holds no numbers"),
        ([[1], [1]], {"output": "answer"}, "no output 'answer', it has: prediction, words"),
        ([[1], [1]], {"label": "z"}, "no column 'z', it has: "),
        ([[1], [1]], {"slice_by": "z"}, "slice_by names 'z'"),
        ([[1], [1]], {"slice_by": "features"}, "no such column of single values"),
    ],
)
def test_what_a_regression_cannot_be_measured_by(
    sums: Dataset, publish: Publish, weights: Any, changes: dict[str, str], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        evaluate_graph(publish(weights), sums, config(**changes))
    assert "\n" not in str(caught.value)


def test_a_classifiers_label_must_be_class_numbers(classes: Dataset, publish: Publish) -> None:
    answers = publish([[1], [1]], "label")
    with pytest.raises(InputError, match="values per row"):
        evaluate_graph(answers, classes, config(label="features"))
    found = evaluate_graph(answers, classes, CONFIG)
    assert found.metrics["accuracy"] == 0.0, "numbers are no class names"
