"""The whole job: a registered version in, a smaller one out, or none with its reason."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from cluster.cli.import_model import import_path
from cluster.errors import InputError, JobFailedError, NotRunningError
from cluster.model_package import ensure_local_key, golden, open_version
from cluster.model_ref import ModelRef
from cluster.registry import ModelRegistry
from cluster.settings import Settings
from cluster.tracking import open_client
from jobs.compress import check, compress
from jobs.compression.config import CompressConfig
from jobs.train import train
from jobs.training.config import TrainConfig
from tests.tiny_models import save_llama

DIGITS: dict[str, Any] = {
    "name": "tiny",
    "data": {
        "name": "digits",
        "source": {"kind": "sklearn", "dataset": "digits"},
        "splits": {"test": 0.2},
    },
    "model": {"family": "cnn", "channels": [8], "hidden_size": 64},
    "steps": 40,
    "batch_size": 32,
    "optimizer": {"learning_rate": 5e-3},
    "launcher": "local",
}
TEXT = "the mirror follows the sun and keeps its rays on one target"

BUDGET = 0.002
STUDENT = {"family": "causal_lm", "hidden_size": 16, "num_layers": 1, "num_heads": 1}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """A home whose MLflow is a file, with a classifier 'tiny' and a language model 'words'."""
    home = tmp_path_factory.mktemp("home")
    ensure_local_key(home / "keys")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)  # such an MLflow keeps artifacts below the current directory
        settings = Settings(home=home, mlflow_tracking_uri=f"sqlite:///{home / 'mlflow.db'}")
        train(TrainConfig.model_validate(DIGITS), settings)
        words = save_llama(home / "words", TEXT, steps=80)
        import_path(words, "words", settings, say=lambda _line: None)
        yield settings


@pytest.fixture(scope="module")
def text_data(settings: Settings) -> dict[str, Any]:
    path = settings.home / "text.txt"
    path.write_text("".join(f"{TEXT} {number}\n" for number in range(200)))
    return {
        "name": "text",
        "source": {"kind": "text", "paths": [str(path)]},
        "splits": {"by": "position"},
        "text": {"sequence_length": 32, "tokenizer": {"kind": "bpe", "vocab_size": 300}},
    }


@pytest.fixture(scope="module")
def own_data(settings: Settings, text_data: dict[str, Any]) -> dict[str, Any]:
    """The same text, in the tokens of 'words'."""
    tokenizer = {"kind": "existing", "path": str(settings.home / "words")}
    return {**text_data, "text": {**text_data["text"], "tokenizer": tokenizer}}


def config(model: str, *candidates: dict[str, Any], **values: Any) -> CompressConfig:
    given = {
        "model": model,
        "candidates": candidates,
        "speed_rounds": 1,
        "num_threads": 1,
        **values,
    }
    return CompressConfig.model_validate(given)


def last_line(out: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(out.strip().splitlines()[-1].removeprefix("result: "))
    return values


def test_a_classifier_in_8_bits(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    candidates = ({"method": "int8_dynamic"}, {"method": "int8_static", "calibration_rows": 64})
    compress(config("tiny@candidate", *candidates, max_loss_increase=0.2), settings)
    result = last_line(capsys.readouterr().out)
    registry = ModelRegistry.open(settings)
    version = registry.resolve(ModelRef.parse("tiny@candidate"))
    parent = registry.resolve(ModelRef.parse("tiny/1"))
    assert (version.digest, version.parent_digest) == (result["digest"], parent.digest)

    package = open_version(version, settings)
    golden.replay(package)
    manifest, before = package.manifest, open_version(parent, settings).manifest
    assert manifest.lineage.source == "jobs.compress"
    assert manifest.lineage.dataset_digest == before.lineage.dataset_digest
    assert manifest.processing == before.processing
    assert manifest.golden.inputs == before.golden.inputs
    assert 0 < manifest.parity["largest_difference"] < manifest.parity["tolerance"]  # type: ignore[operator]
    assert manifest.quantisation["num_bits"] == 8
    smaller = sum(entry.size_bytes for entry in manifest.files.values())
    assert smaller * 2 < sum(entry.size_bytes for entry in before.files.values())

    (evaluation,) = registry.evaluations(version.digest)
    assert evaluation.split == "validation"
    assert evaluation.metrics["accuracy"] == manifest.metrics["validation/accuracy"]
    run = open_client(settings).get_run(version.run_id)
    assert run.data.tags["mlflow.parentRunId"] == parent.run_id
    measured = run.data.metrics
    for label in ("int8_dynamic", "int8_static"):
        assert measured[f"{label}/size_ratio"] > 2
        assert measured[f"{label}/speed_ratio"] > 0
        assert measured[f"{label}/log_loss_increase"] < 0.2
    assert measured["parent/size_bytes"] > measured["int8_static/size_bytes"]


def test_a_language_model_whose_search_stops_at_the_budget(
    settings: Settings, text_data: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """4 bits lose more than this budget allows; 8 bits do not."""
    candidates = (
        {"method": "int8_weights", "group_size": 32},
        {"method": "int4_weights", "group_size": None},
    )
    given = config(
        "words/1", *candidates, data=text_data, name="words-small", max_loss_increase=BUDGET
    )
    compress(given, settings)
    result = last_line(capsys.readouterr().out)
    figures = result["candidates"]
    assert figures["int8_weights-g32"]["loss_increase"] < BUDGET
    assert figures["int4_weights-rows"]["loss_increase"] > BUDGET
    version = ModelRegistry.open(settings).resolve(ModelRef.parse("words-small@candidate"))
    manifest = open_version(version, settings).manifest
    assert manifest.quantisation["method"] == "int8_weights"
    assert manifest.metrics["validation/loss"] > 0

    with pytest.raises(InputError, match="is quantised already"):
        check(config("words-small@candidate", *candidates), settings)


def test_none_within_the_budget_registers_nothing_and_names_the_best(
    settings: Settings, text_data: dict[str, Any]
) -> None:
    rows = {"method": "int4_weights", "group_size": None}
    given = config("words/1", rows, data=text_data, name="never", max_loss_increase=BUDGET)
    with pytest.raises(JobFailedError) as caught:
        compress(given, settings)
    assert "words/1 is not compressed: none stays within the budget; the best found is" in str(
        caught.value
    )
    assert ModelRegistry.open(settings).list_versions("never") == []
    assert list((settings.home / "storage" / "packages").glob(".*")) == []


def test_a_difference_beyond_the_tolerance_is_not_packaged(
    settings: Settings, text_data: dict[str, Any]
) -> None:
    int8 = {"method": "int8_weights", "group_size": 32}
    given = config("words/1", {**int8, "relative_tolerance": 1e-6}, data=text_data, name="never")
    with pytest.raises(JobFailedError, match=r"none can be packaged; int8_.* differs by"):
        compress(given, settings)


def test_pruned_and_distilled_by_the_training_that_there_is(
    settings: Settings,
    text_data: dict[str, Any],
    own_data: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What is trained has the tokenizer of its data; half of its weights stay zero."""
    tuned = {"method": "prune", "steps": 6, "batch_size": 4, "launcher": "local"}
    zeros = {**tuned, "structure": "unstructured", "sparsity": 0.5}
    with pytest.raises(InputError, match="made with another tokenizer"):
        compress(config("words/1", zeros, data=text_data), settings)

    narrow = {**tuned, "structure": "neurons", "sparsity": 0.5}
    student = {**tuned, "method": "distill", "model": STUDENT}
    given = config(
        "words/1", zeros, narrow, student, data=own_data, name="trained", max_loss_increase=9
    )
    compress(given, settings)
    result = last_line(capsys.readouterr().out)
    figures = result["candidates"]
    assert figures["prune-unstructured-0.5"]["size_ratio"] == pytest.approx(1, abs=0.01)
    # Its embeddings, a third of its weights, are whole.
    assert 0.6 < figures["prune-unstructured-0.5"]["density"] < 0.7
    assert figures["prune-neurons-0.5"]["density"] == 1
    assert figures["prune-neurons-0.5"]["size_ratio"] > 1.1
    assert figures["distill-1x16"]["size_ratio"] > 2
    version = ModelRegistry.open(settings).resolve(ModelRef.parse("trained@candidate"))
    package = open_version(version, settings)
    golden.replay(package)
    shape = json.loads((package.model_dir / "config.json").read_bytes())
    assert shape["num_hidden_layers"] == 1, "the smallest was chosen"
    assert package.manifest.quantisation == {}
    assert package.manifest.parity["tolerance"] > 0  # type: ignore[operator]
    assert not list((settings.home / "storage" / "packages").glob(".*"))


def test_a_training_that_diverges_does_not_cost_the_other_candidates(
    settings: Settings, own_data: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    wild = {
        "method": "prune",
        "structure": "unstructured",
        "sparsity": 0.5,
        "steps": 2,
        "batch_size": 4,
        "num_workers": 1,
        "launcher": "local",
        "optimizer": {"learning_rate": 1e30},
    }
    int8 = {"method": "int8_weights", "group_size": 32}
    given = config("words/1", int8, wild, data=own_data, name="steady", max_loss_increase=1)
    compress(given, settings)
    out = capsys.readouterr().out
    assert "not to be packaged: the model's 'loss'" in out
    version = ModelRegistry.open(settings).resolve(ModelRef.parse("steady@candidate"))
    assert open_version(version, settings).manifest.quantisation["method"] == "int8_weights"
    with pytest.raises(JobFailedError, match=r"none can be packaged; prune.*no finite number"):
        compress(config("words/1", wild, data=own_data, name="never"), settings)


def test_without_a_key_to_sign_with_nothing_is_begun(
    settings: Settings, own_data: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    key = settings.keys_dir / "signing_key.pem"
    key.rename(key.with_suffix(".away"))
    try:
        with pytest.raises(NotRunningError, match="there is no signing key"):
            compress(config("words/1", {"method": "int8_weights"}, data=own_data), settings)
    finally:
        key.with_suffix(".away").rename(key)
    assert capsys.readouterr().out == ""


def test_a_training_names_its_teacher_for_good(
    settings: Settings, own_data: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = {"teacher": "words@candidate", "temperature": 3.0}
    values = {
        "name": "student",
        "data": own_data,
        "model": {**STUDENT, "distillation": teacher},
        "steps": 3,
        "batch_size": 4,
        "launcher": "local",
    }
    train(TrainConfig.model_validate(values), settings)
    result = last_line(capsys.readouterr().out)
    params = open_client(settings).get_run(result["run_id"]).data.params
    digest = ModelRegistry.open(settings).resolve(ModelRef.parse("words/1")).digest
    assert params["model.distillation.teacher"] == "words/1"
    assert params["model.distillation.teacher_digest"] == digest

    values["model"] = {**STUDENT, "distillation": {"teacher": "tiny/1"}}
    with pytest.raises(InputError, match=r"teacher tiny/1 is of kind 'graph'"):
        train(TrainConfig.model_validate(values), settings)


def test_what_does_not_fit_is_refused_before_the_data_is_read(settings: Settings) -> None:
    with pytest.raises(InputError, match="'int8_weights' is for a package of kind"):
        compress(config("tiny/1", {"method": "int8_weights"}), settings)
    with pytest.raises(InputError, match="group_size 128 does not divide the 32 columns"):
        compress(config("words/1", {"method": "int8_weights"}), settings)
