"""The gate on real packages: what it compares with, what it records, and who else moves aliases."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cluster.config import parse_config
from cluster.errors import ConfigError, ConflictError, HeliostatError, InputError, JobFailedError
from cluster.model_package import Lineage, LocalSigner, ensure_local_key, write_package
from cluster.registry import ModelRegistry, ModelVersion
from cluster.settings import Settings
from cluster.storage import Storage
from cluster.tracking import RunTracker, open_client
from jobs import promote as module
from jobs.data.config import DataConfig
from jobs.prepare import open_catalog
from jobs.promote import find_contest, promote
from jobs.promotion.config import ServiceConfig

SERVICE: dict[str, Any] = {
    "service": "adding",
    "model": "sums",
    "owner": "us",
    "purpose": "adds two numbers",
    "metric": "mae",
    "objective": 1.0,
    "budget": {"max_regression": 0.1},
}


@pytest.fixture(scope="module")
def kept_settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A home with a table of sums in it; its MLflow is a file."""
    home = tmp_path_factory.mktemp("home")
    ensure_local_key(home / "keys")
    lines = [f"{n % 13},{n % 7},{n % 13 + n % 7}" for n in range(200)]
    (home / "sums.csv").write_text("\n".join(["a,b,y", *lines]))
    settings = Settings(home=home, mlflow_tracking_uri=f"sqlite:///{home / 'mlflow.db'}")
    open_client(settings).search_experiments()  # makes the tables, which takes seconds
    return settings


@pytest.fixture(scope="module")
def dataset_digest(kept_settings: Settings) -> str:
    source = {
        "kind": "table",
        "path": str(kept_settings.home / "sums.csv"),
        "target": "y",
        "task": "regression",
    }
    values = {"name": "sums", "source": source, "splits": {"test": 0.5, "validation": 0.05}}
    config = parse_config(values, DataConfig, source="test")
    dataset, _ = open_catalog(kept_settings).ensure(config)
    return dataset.info.digest


@pytest.fixture
def settings(kept_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The same home with a registry of its own."""
    monkeypatch.chdir(tmp_path)  # such an MLflow keeps artifacts below the current directory
    shutil.copyfile(kept_settings.home / "mlflow.db", tmp_path / "mlflow.db")
    own = {
        "database_url": f"sqlite:///{tmp_path / 'own.db'}",
        "mlflow_tracking_uri": f"sqlite:///{tmp_path / 'mlflow.db'}",
    }
    return kept_settings.model_copy(update=own)


@pytest.fixture
def registry(settings: Settings) -> ModelRegistry:
    return ModelRegistry.open(settings)


Register = Callable[..., ModelVersion]


@pytest.fixture
def register(
    settings: Settings, registry: ModelRegistry, dataset_digest: str, tmp_path: Path
) -> Register:
    """Register a graph that is off by `error`, as candidate, as training does."""

    def register(error: float, name: str = "sums") -> ModelVersion:
        directory = tmp_path / f"{name}-{error}"
        directory.mkdir()
        weights = numpy_helper.from_array(np.ones((2, 1), dtype=np.float32), "W")
        bias = numpy_helper.from_array(np.array([error], dtype=np.float32), "b")
        graph = helper.make_graph(
            [
                helper.make_node("MatMul", ["features", "W"], ["s"]),
                helper.make_node("Add", ["s", "b"], ["prediction"]),
            ],
            "sum",
            [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", 2])],
            [helper.make_tensor_value_info("prediction", TensorProto.FLOAT, ["n", 1])],
            [weights, bias],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.save(model, directory / "model.onnx")
        published = write_package(
            directory,
            name=name,
            kind="graph",
            storage=Storage.open(settings.storage_root),
            signer=LocalSigner(settings.keys_dir),
            lineage=Lineage(dataset_digest=dataset_digest),
        )
        version = registry.register(name, published)
        registry.set_alias(name, "candidate", version.version, actor="jobs.train", reason="trained")
        return version

    return register


def service(**changes: Any) -> ServiceConfig:
    return parse_config({**SERVICE, **changes}, ServiceConfig, source="test")


def crown(registry: ModelRegistry, version: int | None) -> None:
    registry.set_alias("sums", "champion", version, actor="ops", reason="by hand")


def alias(registry: ModelRegistry, name: str = "candidate") -> int | None:
    found = registry.get_alias("sums", name)
    return found.version if found else None


def test_a_forced_promotion_is_recorded_though_the_alias_does_not_move(
    settings: Settings, registry: ModelRegistry, register: Register
) -> None:
    register(5.0)
    assert alias(registry) == 1
    promote(service(force="a rehearsal", actor="ada"), settings)
    last = registry.history("sums")[-1]
    assert (last.alias, last.from_version, last.to_version, last.actor) == (
        "candidate",
        1,
        1,
        "ada",
    )
    assert last.reason.startswith(
        "forced: a rehearsal; without force it would be refused: mae is 5"
    )
    (experiment,) = open_client(settings).search_experiments(filter_string="name = 'promote'")
    runs = open_client(settings).search_runs([experiment.experiment_id])
    assert runs[0].data.tags["promoted"] == "true"
    assert runs[0].data.tags["reason"] == last.reason


def test_what_was_measured_stands_in_the_registry(
    settings: Settings, registry: ModelRegistry, register: Register, dataset_digest: str
) -> None:
    first, second = register(0.5), register(0.25)
    crown(registry, 1)
    promote(service(), settings)
    assert alias(registry) == 2
    for version, mae in ((first, 0.5), (second, 0.25)):
        (found,) = registry.evaluations(version.digest)
        assert found.metrics["mae"] == pytest.approx(mae, abs=1e-5)
        assert (found.dataset_digest, found.split) == (dataset_digest, "test")


def test_after_all_is_undeployed_the_last_champion_is_still_the_measure(
    settings: Settings, registry: ModelRegistry, register: Register
) -> None:
    register(0.1)
    crown(registry, 1)
    crown(registry, None)
    register(0.9)
    with pytest.raises(JobFailedError, match="not shown to be less than"):
        promote(service(), settings)
    assert alias(registry) == 1
    promote(service(candidate="sums/1"), settings)  # coming back, it has nobody to beat
    registry.set_alias("sums", "candidate", None, actor="ops", reason="to delete it")
    registry.delete_version("sums", 1)
    promote(service(), settings)
    assert alias(registry) == 2


def test_a_champion_that_moves_meanwhile_stops_the_decision(
    settings: Settings, registry: ModelRegistry, register: Register, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in (0.5, 0.05, 0.4):
        register(error)
    crown(registry, 1)
    real = module.log_evaluation

    def slowly(*arguments: Any) -> None:
        crown(registry, 2)
        real(*arguments)

    monkeypatch.setattr(module, "log_evaluation", slowly)
    before = registry.history("sums")
    with pytest.raises(ConflictError, match="run it again"):
        promote(service(), settings)
    assert registry.history("sums")[:-1] == before, "only the champion has moved"
    (experiment,) = open_client(settings).search_experiments(filter_string="name = 'promote'")
    run = open_client(settings).search_runs([experiment.experiment_id], max_results=1)[0]
    assert run.info.status == "FAILED"
    assert "promoted" not in run.data.tags


def test_of_two_promotions_at_once_one_wins(
    settings: Settings, registry: ModelRegistry, register: Register, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(0.3)
    register(0.2)
    together, real = threading.Barrier(2), module.log_evaluation

    def both(*arguments: Any) -> None:
        together.wait(30)
        real(*arguments)

    monkeypatch.setattr(module, "log_evaluation", both)
    outcomes: dict[int, HeliostatError | None] = {}

    def run(version: int) -> None:
        try:
            promote(service(candidate=f"sums/{version}"), settings)
            outcomes[version] = None
        except HeliostatError as error:
            outcomes[version] = error

    threads = [threading.Thread(target=run, args=(version,)) for version in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = (version for version, error in outcomes.items() if error is None)
    assert isinstance(outcomes[3 - winner], ConflictError)
    assert alias(registry) == winner


def test_a_champion_that_cannot_be_measured_refuses_and_can_be_forced(
    settings: Settings, registry: ModelRegistry, register: Register
) -> None:
    champion = register(0.1)
    crown(registry, 1)
    register(0.2)
    weights = Path(champion.location) / "model" / "model.onnx"
    content = weights.read_bytes()
    weights.chmod(0o600)
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        with pytest.raises(
            JobFailedError, match=r"cannot be compared with champion sums/1: .*model"
        ):
            promote(service(), settings)
        promote(service(force="it was tampered with"), settings)
    finally:
        weights.write_bytes(content)
    assert "forced: it was tampered with" in registry.history("sums")[-1].reason


def test_a_candidate_that_gives_no_numbers_is_refused_as_others_are(
    settings: Settings, registry: ModelRegistry, register: Register
) -> None:
    register(0.1)
    crown(registry, 1)
    register(float("nan"))
    assert alias(registry) == 2
    with pytest.raises(JobFailedError, match=r"cannot be measured: .* is no finite number"):
        promote(service(), settings)
    assert alias(registry) == 1
    assert "sums/2 refused: it cannot be measured" in registry.history("sums")[-1].reason


def test_mlflow_that_is_down_stops_it_before_anything_moves(
    settings: Settings, registry: ModelRegistry, register: Register
) -> None:
    register(0.1)
    before = registry.history("sums")
    down = settings.model_copy(update={"mlflow_tracking_uri": "http://127.0.0.1:9"})
    with pytest.raises(HeliostatError, match="does not answer"):
        promote(service(), down)
    assert registry.history("sums") == before


def test_mlflow_that_goes_away_in_the_middle_costs_the_record_not_the_decision(
    settings: Settings, registry: ModelRegistry, register: Register,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    register(0.1)
    monkeypatch.setattr(RunTracker, "set_tags", lambda self, _tags: self._try("tags", _refuse))
    promote(service(), settings)
    assert "mae 0.1 meets the objective" in registry.history("sums")[-1].reason
    assert "MLflow did not take tags" in caplog.text


def _refuse() -> None:
    raise ConnectionError("gone")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "f1"}, "key 'metric' is 'f1'"),
        ({"objective": True}, "expected a number"),
        ({"objective": "high"}, "key 'objective' is 'high'"),
        ({"objective": float("nan")}, "expected a finite number"),
        ({"budget": {"max_regression": float("inf")}}, "expected a finite number"),
        ({"budget": {"max_regression": -0.1}}, "greater than or equal to 0"),
        ({"budget": {"max_regression": 0, "alpha": 0.9}}, "less than 0.5"),
        ({"budget": None}, "budget"),
        ({"owner": ""}, "key 'owner'"),
        ({"owner": " \n"}, "key 'owner'"),
        ({"purpose": "a\x1b[2Jb"}, "expected one line without control characters"),
        ({"actor": "ada\nroot"}, "expected one line without control characters"),
        ({"actor": " "}, "key 'actor'"),
        ({"num_threads": 257}, "less than or equal to 256"),
        ({"model": "../up"}, "key 'model' is '../up'"),
        ({"force": True}, "key 'force'"),
        ({"force": " "}, "key 'force'"),
        ({"actor": "a" * 129}, "key 'actor'"),
        ({"champion": "sums/1"}, "unknown key 'champion'"),
        ({"split": "train"}, "key 'split' is 'train'"),
    ],
)
def test_what_a_service_cannot_say(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        service(**changes)
    assert "\n" not in str(caught.value)


def test_what_a_service_says_is_stripped() -> None:
    assert service(purpose=" adds two numbers\n").purpose == "adds two numbers"


def test_who_cannot_be_a_candidate(registry: ModelRegistry, register: Register) -> None:
    register(0.1)
    register(0.1, "other")
    crown(registry, 1)
    for changes, message in (
        ({"candidate": "sums/9"}, "no version 9"),
        ({"candidate": "other/1"}, "no version of the service's model 'sums'"),
        ({"candidate": "sums@champion"}, "is the champion already"),
        ({"candidate": "a b"}, "is not valid"),
        ({"model": "nothing"}, "'nothing' does not exist"),
    ):
        with pytest.raises(HeliostatError, match=message) as caught:
            find_contest(service(**changes), registry)
        assert "\n" not in str(caught.value)


def test_a_metric_that_the_model_does_not_have_is_named(
    settings: Settings, register: Register
) -> None:
    register(0.1)
    with pytest.raises(InputError, match="expected one of: mse, mae"):
        promote(service(metric="accuracy"), settings)
