"""Estimators saved with skops become graphs that answer like them, or are refused with one line."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pandas as pd
import pytest
import skops.io
from sklearn.cluster import KMeans
from sklearn.compose import ColumnTransformer, make_column_selector
from sklearn.ensemble import (
    GradientBoostingRegressor,
    RandomForestClassifier,
)
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.multioutput import MultiOutputClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler
from sklearn.svm import SVC

from cluster.errors import ForbiddenFileError, HeliostatError, PackageError, ParityError
from cluster.model_package import LocalSigner, Manifest, write_package
from cluster.model_package.importing import PreparedImport, prepare_import
from cluster.processing import postprocess, preprocess, public_inputs, public_outputs
from cluster.runtimes.onnx import OnnxRuntime
from cluster.storage import Storage

Prepare = Callable[[Any], PreparedImport]

GENERATOR = np.random.default_rng(0)
X = GENERATOR.normal(50, 20, (120, 4))
CLASSES = (X[:, 0] > 50).astype(int) + (X[:, 1] > 60)
FRAME = pd.DataFrame(
    {
        "age": X[:, 0],
        "city of birth": GENERATOR.choice(["Bern", "Zürich", "Genève"], 120),
        "rooms": GENERATOR.integers(1, 5, 120),
        "unused": X[:, 1],
        "income (k)": X[:, 2],
    }
)
ANSWERS = np.where(FRAME["age"] + 10 * (FRAME["city of birth"] == "Bern") > 50, "yes", "no")


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    directory = tmp_path / "stage"
    directory.mkdir()
    return directory


@pytest.fixture
def prepare(tmp_path: Path, stage: Path) -> Prepare:
    def call(estimator: Any) -> PreparedImport:
        skops.io.dump(estimator, tmp_path / "model.skops")
        return prepare_import(tmp_path / "model.skops", stage)

    return call


@pytest.fixture
def package(prepare: Prepare, stage: Path, storage: Storage, keys_dir: Path) -> Any:
    def call(estimator: Any) -> tuple[Manifest, OnnxRuntime]:
        prepared = prepare(estimator)
        published = write_package(
            stage,
            name="m",
            kind=prepared.kind,
            storage=storage,
            signer=LocalSigner(keys_dir),
            processing=prepared.processing,
            golden_inputs=prepared.golden_inputs,
            profile=prepared.profile,
            parity=prepared.parity,
        )
        return published.manifest, OnnxRuntime(stage / "model.onnx")

    return call


def frame_pipeline(*, remainder: str = "drop") -> Pipeline:
    columns = ColumnTransformer(
        [
            ("numbers", make_pipeline(StandardScaler()), ["age", "income (k)"]),
            ("texts", OneHotEncoder(), ["city of birth"]),
            ("counts", OneHotEncoder(), ["rooms"]),
        ],
        remainder=remainder,
    )
    return Pipeline([("columns", columns), ("model", LogisticRegression(max_iter=2000))])


@pytest.mark.parametrize(
    "estimator",
    [
        LogisticRegression(max_iter=5000),
        RandomForestClassifier(5, random_state=0),
        make_pipeline(StandardScaler(), KNeighborsClassifier(algorithm="brute")),
    ],
    ids=lambda estimator: type(estimator).__name__,
)
def test_a_classifier_of_an_array_gives_labels_and_probabilities(
    package: Any, estimator: Any
) -> None:
    estimator.fit(X, CLASSES)
    manifest, runtime = package(estimator)
    assert [str(spec) for spec in public_inputs(manifest)] == ["features: FP32 [any, 4]"]
    assert [str(spec) for spec in public_outputs(manifest)] == [
        "label: INT64 [any]",
        "probabilities: FP32 [any, 3]",
    ]
    assert manifest.profile == {"class_names": ["0", "1", "2"]}
    assert 0 <= manifest.parity["largest_difference"] <= manifest.parity["tolerance"] <= 1e-4  # type: ignore[operator]
    rows = X.astype(np.float32)
    found = postprocess(manifest, runtime.run(preprocess(manifest, {"features": rows})))
    # Rows that were trained on lie beside thresholds, which 32 bits may cross.
    assert (found["label"] == estimator.predict(rows)).mean() > 0.98
    # What was certified is no single leaf of the trees.
    assert len(np.unique(manifest.golden.outputs["label"])) > 1


def test_a_regressor_gives_one_number_per_row(package: Any) -> None:
    estimator = GradientBoostingRegressor(n_estimators=5).fit(X, X[:, 0] * 2)
    manifest, _ = package(estimator)
    assert [str(spec) for spec in public_outputs(manifest)] == ["prediction: FP32 [any]"]


def test_several_targets_are_several_numbers_per_row(package: Any) -> None:
    manifest, _ = package(LinearRegression().fit(X, X[:, :2]))
    assert [str(spec) for spec in public_outputs(manifest)] == ["prediction: FP32 [any, 2]"]


def test_a_frame_of_numbers_names_its_features(package: Any) -> None:
    frame = pd.DataFrame(X, columns=["a", "b", "c", "d"])
    manifest, _ = package(LogisticRegression(max_iter=5000).fit(frame, ANSWERS))
    assert manifest.profile == {"feature_names": ["a", "b", "c", "d"], "class_names": ["no", "yes"]}
    assert next(str(spec) for spec in public_outputs(manifest)) == "label: BYTES [any]"


@pytest.mark.parametrize("remainder", ["drop", "passthrough"])
def test_a_frame_of_mixed_columns_is_an_input_per_column(package: Any, remainder: str) -> None:
    estimator = frame_pipeline(remainder=remainder).fit(FRAME, ANSWERS)
    manifest, runtime = package(estimator)
    specs = {spec.name: spec.datatype for spec in public_inputs(manifest)}
    assert specs["city of birth"] == "BYTES"
    assert specs["age"] == specs["rooms"] == "FP32"
    assert ("unused" in specs) == (remainder == "passthrough")
    rows = {
        name: (
            np.array([[v.encode()] for v in FRAME[name]], dtype=object)
            if datatype == "BYTES"
            else FRAME[[name]].to_numpy(np.float32)
        )
        for name, datatype in specs.items()
    }
    found = runtime.run(preprocess(manifest, rows))
    np.testing.assert_allclose(found["probabilities"], estimator.predict_proba(FRAME), atol=1e-4)
    assert [label.decode() for label in found["label"]] == estimator.predict(FRAME).tolist()


def test_columns_chosen_by_their_type_are_found_by_name(package: Any) -> None:
    numbers = make_column_selector(dtype_include=np.number, pattern="age|income")
    columns = ColumnTransformer([("n", StandardScaler(), numbers)])
    search = GridSearchCV(make_pipeline(columns, LogisticRegression()), {}, cv=2)
    manifest, _ = package(search.fit(FRAME, ANSWERS))
    assert [spec.name for spec in public_inputs(manifest)] == ["age", "income (k)"]


def test_documents_are_one_text_input(package: Any) -> None:
    texts = ["the cat sat", "a dog ran", "the cat ran", "a dog sat"]
    manifest, _ = package(
        make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(texts, [*"cdcd"])
    )
    assert [str(spec) for spec in public_inputs(manifest)] == ["text: BYTES [any, 1]"]


def test_a_classifier_without_probabilities_gives_labels_alone(prepare: Prepare) -> None:
    prepared = prepare(make_pipeline(StandardScaler(), SVC()).fit(X, CLASSES))
    assert "labels alone" in prepared.notes[0]


@pytest.mark.parametrize(
    ("estimator", "error", "message"),
    [
        (LogisticRegression(), PackageError, "has no n_features_in_"),
        (KMeans(2, n_init=1).fit(X), PackageError, "KMeans is neither a classifier nor"),
        (
            MultiOutputClassifier(LogisticRegression()).fit(X, np.c_[CLASSES, CLASSES]),
            PackageError,
            "several labels at once",
        ),
        (
            make_pipeline(FunctionTransformer(np.log1p), SVC()).fit(np.abs(X), CLASSES),
            HeliostatError,
            "",
        ),
        (np.zeros(3), PackageError, "ndarray is neither a classifier nor"),
    ],
    ids=["unfitted", "clusters", "several labels", "function", "array"],
)
def test_what_is_no_single_answer_is_refused(
    prepare: Prepare, stage: Path, estimator: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        prepare(estimator)
    assert "\n" not in str(caught.value)


class Own(LogisticRegression):
    """Somebody's own type, whose code a package must not need."""


def test_trees_whose_nodes_lead_out_of_them_are_not_run(prepare: Prepare) -> None:
    """scikit-learn's compiled code would follow them to any address."""
    forest = RandomForestClassifier(2, random_state=0).fit(X, CLASSES)
    honest = forest.estimators_[1].tree_
    for change in ({"left_child": 10**9}, {"right_child": 0}, {"feature": 4}, {"feature": -7}):
        state = honest.__getstate__()
        nodes = state["nodes"].copy()
        for name, value in change.items():
            nodes[name][0] = value
        spoiled = type(honest)(4, np.array([3]), 1)
        spoiled.__setstate__({**state, "nodes": nodes})
        forest.estimators_[1].tree_ = spoiled
        with pytest.raises(PackageError, match="decision tree's nodes lead out of it"):
            prepare(forest)
    forest.estimators_[1].tree_ = honest
    prepare(forest)
    forest.n_features_in_ = 3
    with pytest.raises(PackageError, match="decision tree's nodes lead out of it"):
        prepare(forest)
    boosting = GradientBoostingRegressor(n_estimators=2).fit(X, X[:, 0])
    boosting.estimators_ = np.hstack([boosting.estimators_] * 3)
    with pytest.raises(PackageError, match="decision tree's nodes lead out of it"):
        prepare(boosting)


def test_types_that_are_not_known_are_refused_by_name(prepare: Prepare) -> None:
    with pytest.raises(ForbiddenFileError, match=r"not known to be harmless: .*Own"):
        prepare(Own().fit(X, CLASSES))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_features_in_", 10**9),
        ("n_features_in_", -1),
        ("n_features_in_", "x"),
        ("n_features_in_", 3),
        ("feature_names_in_", np.array(["a"], dtype=object)),
        ("feature_names_in_", np.array([*"aaaa"], dtype=object)),
        ("feature_names_in_", 7),
    ],
)
def test_features_that_no_estimator_has_are_one_line(
    prepare: Prepare, name: str, value: object
) -> None:
    for estimator in (LinearRegression(), GradientBoostingRegressor(n_estimators=2)):
        estimator.fit(X, X[:, 0])
        setattr(estimator, name, value)
        with pytest.raises(PackageError) as caught:
            prepare(estimator)
        assert "\n" not in str(caught.value)


def test_columns_that_the_converter_calls_alike_are_refused(prepare: Prepare) -> None:
    frame = pd.DataFrame({"a b": X[:, 0], "a_b": X[:, 1]})
    columns = ColumnTransformer([("n", StandardScaler(), ["a b", "a_b"])])
    with pytest.raises(PackageError, match="column 'a_b' and another one differ only in marks"):
        prepare(make_pipeline(columns, LogisticRegression()).fit(frame, CLASSES))


@pytest.mark.parametrize("name", ["model.pkl", "model.joblib", "model.skops"])
def test_pickles_are_refused_with_the_way_to_convert_them(
    tmp_path: Path, stage: Path, name: str
) -> None:
    (tmp_path / name).write_bytes(pickle.dumps(LogisticRegression()))
    with pytest.raises(PackageError, match=r"skops\.io\.dump") as caught:
        prepare_import(tmp_path / name, stage)
    assert "\n" not in str(caught.value)


def test_a_graph_that_answers_otherwise_is_not_imported(
    prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = onnx.save

    def spoiled(model: Any, path: Path) -> None:
        for tensor in (a.floats for node in model.graph.node for a in node.attribute):
            if tensor:
                tensor[0] += 1.0
        save(model, path)

    monkeypatch.setattr(onnx, "save", spoiled)
    with pytest.raises(ParityError, match="differs by"):
        prepare(LinearRegression().fit(X, X[:, 0]))
