"""What somebody with a model of their own types, and what they read."""

from __future__ import annotations

import json
import shutil
import sqlite3
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from typer.testing import CliRunner, Result

from cluster import database
from cluster.cli.models import app
from cluster.errors import (
    ChangedFileError,
    ConflictError,
    ExtraFileError,
    HeliostatError,
    InputError,
    InvalidReferenceError,
    NotFoundError,
    NotRunningError,
    OverloadedError,
    UnknownKeyError,
    UsageError,
)
from cluster.evaluations import EvaluationRecord
from cluster.model_package import Keyset, ensure_local_key
from cluster.model_ref import ModelRef
from cluster.registry import ModelRegistry
from cluster.settings import Settings
from cluster.tracking import open_client
from tests.tiny_models import save_adapter


@pytest.fixture
def home(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HELIOSTAT_HOME", str(settings.home))
    monkeypatch.setenv("HELIOSTAT_MLFLOW_PORT", str(settings.mlflow_port))
    ensure_local_key(settings.keys_dir)
    return settings.home


@pytest.fixture
def name() -> str:
    return f"adder-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2])
    body = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "g", [x], [y])
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "adder.onnx")
    return tmp_path / "adder.onnx"


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def read(*arguments: str) -> Any:
    return json.loads(run(*arguments, "--json").stdout)


def fails(error: type[HeliostatError], *arguments: str) -> str:
    with pytest.raises(error) as caught:
        CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_onnx_file_becomes_a_candidate_that_can_be_shown_and_verified(
    home: Path, graph: Path, name: str
) -> None:
    imported = run("import", str(graph), "--name", name)
    assert f"{name}/1 is registered" in imported.stdout
    assert "heliostat deploy" in imported.stdout
    (listed,) = read("list", name)
    assert (listed["version"], listed["aliases"], listed["kind"]) == (1, ["candidate"], "graph")
    shown = read("show", f"{name}@candidate")
    assert shown["inputs"] == ["x: FP32 [any, 2]"]
    assert shown["lineage"]["source"] == "import"
    verified = read("verify", f"{name}/1")
    assert verified["verified"] is True
    assert verified["digest"] == listed["digest"]
    assert list(verified["files"]) == ["model/model.onnx"]
    chain = [(link["what"], link["state"]) for link in verified["chain"]]
    assert chain == [("package", "verified"), ("dataset", "unknown"), ("commit", "unknown")]
    assert f"package    verified  {listed['digest']}" in run("verify", f"{name}/1").stdout
    assert name in run("list").stdout
    assert listed["digest"] in run("verify", listed["location"]).stdout
    assert "accuracy" not in run("show", f"{name}/1").stdout


def test_two_versions_are_compared_by_evaluations_on_the_same_data(
    home: Path, graph: Path, name: str, settings: Settings
) -> None:
    registry = ModelRegistry.open(settings)
    for version, accuracy in ((1, 0.5), (2, 0.75)):
        run("import", str(graph), "--name", name)
        digest = registry.resolve(ModelRef(name, version=version)).digest
        for value in (0.1, accuracy):  # the newest counts
            record = EvaluationRecord(digest, "sha256:da7a", "test", {"accuracy": value}, "r")
            registry.add_evaluation(record)
    assert "accuracy: 0.75" in run("show", f"{name}/2").stdout
    rows = {row["metric"]: row for row in read("show", f"{name}/1", f"{name}/2")}
    assert rows.keys() == {"size_mb", "test/accuracy on da7a"}
    assert rows["test/accuracy on da7a"]["difference"] == 0.25


def test_what_comes_out_loads_in_the_libraries_it_came_from(
    home: Path, graph: Path, name: str, language_model_dir: Path, tmp_path: Path
) -> None:
    import onnxruntime
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapter_dir = save_adapter(tmp_path / "lora", language_model_dir)
    run("import", str(language_model_dir), "--name", name)
    run("import", str(adapter_dir), "--name", f"{name}-lora", "--base", f"{name}@candidate")
    run("import", str(graph), "--name", f"{name}-graph")
    out = {kind: tmp_path / "out" / kind for kind in ("model", "lora", "graph")}
    run("export", name + "/1", "--to", str(out["model"]))
    told = run("export", f"{name}-lora@candidate", "--to", str(out["lora"])).stdout
    assert f"its base: {name}/1" in told
    run("export", f"{name}-graph/1", "--to", str(out["graph"]))

    ids = torch.tensor([[1, 2, 3]])
    with torch.inference_mode():
        base = AutoModelForCausalLM.from_pretrained(out["model"], dtype="float32")
        given = AutoModelForCausalLM.from_pretrained(language_model_dir, dtype="float32")
        assert torch.equal(base(ids).logits, given(ids).logits)
        found = PeftModel.from_pretrained(base, out["lora"]).eval()(ids).logits
        assert torch.equal(found, PeftModel.from_pretrained(given, adapter_dir).eval()(ids).logits)
    assert AutoTokenizer.from_pretrained(out["model"])("ab")["input_ids"]
    onnxruntime.InferenceSession(out["graph"] / "model.onnx")

    shown = read("show", f"{name}-lora/1")
    assert shown["lineage"]["parent_digest"] == read("show", f"{name}/1")["digest"]
    again = ("export", f"{name}/1", "--to", str(out["model"]))
    assert "not an empty directory" in fails(InputError, *again)
    spoiled = tmp_path / "spoiled"
    (row,) = read("list", f"{name}-graph")
    shutil.rmtree(home / "cache/packages")
    (Path(row["location"]) / "model/model.onnx").write_bytes(b"other")
    fails(ChangedFileError, "export", f"{name}-graph/1", "--to", str(spoiled))
    assert not spoiled.exists()


def test_an_adapter_is_imported_with_a_language_model(home: Path, graph: Path, name: str) -> None:
    run("import", str(graph), "--name", name)
    arguments = ("import", str(graph), "--name", "x", "--base", f"{name}/1")
    assert "expected a language model" in fails(InputError, *arguments)


def test_an_estimator_becomes_a_graph_with_its_parity(
    home: Path, name: str, tmp_path: Path
) -> None:
    from sklearn.linear_model import LinearRegression
    from skops.io import dump

    rows = np.arange(12.0).reshape(6, 2)
    dump(LinearRegression().fit(rows, rows.sum(axis=1)), tmp_path / "sum.skops")
    imported = run("import", str(tmp_path / "sum.skops"), "--name", name)
    assert "largest difference from scikit-learn: " in imported.stderr
    shown = read("show", f"{name}/1")
    assert shown["outputs"] == ["prediction: FP32 [any]"]
    assert shown["parity"]["largest_difference"] <= shown["parity"]["tolerance"]


def test_two_versions_are_shown_side_by_side(home: Path, graph: Path, name: str) -> None:
    run("import", str(graph), "--name", name)
    run("import", str(graph), "--name", name)
    (row,) = read("show", f"{name}/1", f"{name}/2")
    assert row["metric"] == "size_mb"
    assert row[f"{name}/1"] == row[f"{name}/2"] > 0
    assert row["difference"] == 0
    assert f"{name}/1".upper() in run("show", f"{name}/1", f"{name}/2").stdout
    assert "has versions 1, 2" in fails(NotFoundError, "show", f"{name}/1", f"{name}/3")


@pytest.mark.parametrize("storage", ["folder", "s3"])
def test_this_machines_copy_verifies_while_storage_is_down(
    home: Path, graph: Path, name: str, storage: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    for number in (1, 2):
        run("import", str(graph), "--name", name)
        if number == 1:
            run("show", f"{name}/1")  # makes the copy
    url = "s3://a:b@bucket/root?scheme=http&endpoint_override=127.0.0.1%3A9&region=us-east-1"
    url = url if storage == "s3" else str(tmp_path / "unmounted" / "storage")
    monkeypatch.setenv("HELIOSTAT_STORAGE_URL", url)
    verified = run("verify", f"{name}/1")
    assert "reading this machine's copy" in verified.stderr
    assert "verified: sha256:" in verified.stdout
    if storage == "folder":  # S3's client tries for seconds
        assert read("show", f"{name}/1")["name"] == name
        assert "is this machine's verified copy" in caplog.text
        fails(NotRunningError, "show", f"{name}/2")
        fails(NotRunningError, "verify", f"{name}/2")
    assert not (tmp_path / "unmounted").exists(), "reading makes no folder"


def test_a_tampered_package_does_not_verify(home: Path, graph: Path, name: str) -> None:
    run("import", str(graph), "--name", name)
    (row,) = read("list", name)
    (Path(row["location"]) / "model/extra.json").write_text("{}")
    for target in (f"{name}/1", row["location"]):
        assert "model/extra.json" in fails(ExtraFileError, "verify", target)
    assert not list((home / "cache/packages").glob(".incoming-*"))


def test_an_encrypted_directory_is_said_to_be_one(
    home: Path, graph: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HELIOSTAT_ENCRYPT_PACKAGES", "true")
    Keyset(home / "keys/encryption_keyset.json").ensure()
    run("import", str(graph), "--name", name)
    (row,) = read("list", name)
    assert "is encrypted" in fails(UsageError, "verify", row["location"])
    assert "verified: sha256:" in run("verify", f"{name}/1").stdout


def test_a_package_from_elsewhere_needs_its_key(
    home: Path, graph: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("import", str(graph), "--name", name)
    (row,) = read("list", name)
    monkeypatch.setenv("HELIOSTAT_HOME", str(tmp_path / "other"))
    assert "trusted" in fails(UnknownKeyError, "verify", row["location"])


def test_aliases_move_by_hand_with_a_history(home: Path, graph: Path, name: str) -> None:
    run("import", str(graph), "--name", name)
    run("alias", name, "champion", "1", "--reason", "because")
    changes = read("history", name)
    assert [(c["alias"], c["to_version"]) for c in changes] == [("candidate", 1), ("champion", 1)]
    assert changes[1]["reason"] == "because"
    assert changes[1]["actor"].startswith("cli")
    assert "because" in run("history", name).stdout


def test_the_last_version_is_deleted_once_its_alias_is_removed(
    home: Path, graph: Path, name: str
) -> None:
    run("import", str(graph), "--name", name)
    assert "--remove" in fails(ConflictError, "delete", f"{name}/1", "--yes")
    assert "no alias 'champion'" in fails(NotFoundError, "alias", name, "champion", "--remove")
    assert "--remove" in fails(UsageError, "alias", name, "candidate")
    fails(UsageError, "alias", name, "candidate", "1", "--remove")
    assert "removed" in run("alias", name, "candidate", "--remove", "--reason", "done").stdout
    (_, last) = read("history", name)
    assert (last["from_version"], last["to_version"], last["reason"]) == (1, None, "done")
    run("delete", f"{name}/1", "--yes")
    assert f"'{name}' does not exist" in fails(NotFoundError, "list", name)


def test_without_mlflow_reading_goes_on_and_says_what_it_did_not_look_at(
    home: Path, graph: Path, name: str, monkeypatch: pytest.MonkeyPatch, settings: Settings,
    settings_without_server: Settings,
) -> None:  # fmt: skip
    run("import", str(graph), "--name", name)
    open_client(settings).set_registered_model_alias(name, "best", "1")
    verbs = (("show", f"{name}@candidate"), ("history", name))
    for verb, target in verbs:
        assert f"alias 'best' of '{name}' was moved in MLflow" in run(verb, target).stderr
    monkeypatch.setenv("HELIOSTAT_MLFLOW_PORT", str(settings_without_server.mlflow_port))
    assert read("list", name)[0]["aliases"] == ["candidate"]
    assert read("verify", f"{name}/1")["verified"] is True
    for verb, target in verbs:
        found = run(verb, target)
        assert "candidate" in found.stdout
        assert "edits in MLflow are not looked for" in found.stderr


def test_versions_are_deleted_when_nothing_points_to_them(
    home: Path, graph: Path, name: str
) -> None:
    for _ in range(2):
        run("import", str(graph), "--name", name)
    first, second = read("list", name)
    assert second["aliases"] == ["candidate"]
    assert "candidate" in fails(ConflictError, "delete", f"{name}/2", "--yes")
    assert "NAME/VERSION" in fails(UsageError, "delete", name, "--yes")
    declined = CliRunner().invoke(app, ["delete", f"{name}/1"], input="n\n")
    assert declined.exit_code == 1
    run("delete", f"{name}/1", "--yes")
    assert read("list", name) == [second]
    assert not Path(first["location"]).exists()


def test_what_cannot_be_imported_is_one_line_and_leaves_nothing(
    home: Path, graph: Path, name: str, tmp_path: Path
) -> None:
    assert "none" in fails(InputError, "import", str(tmp_path / "none"), "--name", name)
    fails(InvalidReferenceError, "import", str(graph), "--name", "no good")
    (tmp_path / "empty").mkdir()
    message = fails(HeliostatError, "import", str(tmp_path / "empty"), "--name", name)
    assert "config.json" in message
    assert "staging" not in message
    assert not list((home / "storage").rglob("*.json"))
    assert "does not exist" in fails(NotFoundError, "show", "nothing")
    assert read("list") == []
    assert "models import" in run("list").stdout


def test_an_import_that_cannot_be_registered_leaves_nothing(
    home: Path, settings: Settings, graph: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "_BUSY_TIMEOUT_S", 0)
    assert read("list") == []
    with sqlite3.connect(settings.database.removeprefix("sqlite:///")) as other:
        other.execute("BEGIN IMMEDIATE")
        assert "is busy" in fails(OverloadedError, "import", str(graph), "--name", name)
        other.rollback()
    assert not list((home / "storage/packages").iterdir())
    assert not open_client(settings).search_model_versions(f"name = '{name}'")


def test_without_the_server_an_import_says_so_before_it_works(
    home: Path, graph: Path, name: str, monkeypatch: pytest.MonkeyPatch,
    settings_without_server: Settings,
) -> None:  # fmt: skip
    monkeypatch.setenv("HELIOSTAT_MLFLOW_PORT", str(settings_without_server.mlflow_port))
    message = fails(NotRunningError, "import", str(graph), "--name", name)
    assert "heliostat up" in message
    assert not (home / "storage/packages").exists()
