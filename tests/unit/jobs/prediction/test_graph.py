"""Rows through a graph: what clients would get, in order; bad rows apart, with their reasons."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from cluster.database import open_database
from cluster.errors import ConflictError, InputError
from cluster.ledger import Ledger
from cluster.model_package import open_version
from cluster.model_ref import ModelRef
from cluster.processing import postprocess, preprocess
from cluster.registry import ModelRegistry
from cluster.runtimes.onnx import OnnxRuntime
from cluster.settings import Settings
from cluster.storage import Storage
from cluster.tracking import open_client
from jobs.predict import check
from jobs.prediction.config import PredictConfig
from tests.unit.jobs.prediction.conftest import (
    Predict,
    contents,
    read_errors,
    read_rows,
    write_lines,
)

X = np.random.default_rng(0).normal(size=(25, 2)).astype(np.float32)


@pytest.fixture(scope="module")
def expected(settings: Settings) -> dict[str, np.ndarray]:
    """What a client of the served model gets."""
    version = ModelRegistry.open(settings).resolve(ModelRef.parse("colours/1"))
    package = open_version(version, settings)
    runtime = OnnxRuntime(package.graph_path)
    return postprocess(package.manifest, runtime.run(preprocess(package.manifest, {"x": X})))


def test_answers_are_those_of_serving_in_the_inputs_order(
    run: Predict, tmp_path: Path, expected: dict[str, np.ndarray]
) -> None:
    rows = [{"id": f"r{i}", "x": x.tolist()} for i, x in enumerate(X)]
    output = run(
        "colours/1",
        write_lines(tmp_path / "in.jsonl", rows),
        keep=["id"], rows_per_part=4, batch_size=3,
    )  # fmt: skip
    found = read_rows(output)
    assert [row["row"] for row in found] == list(range(1, 26))
    assert [row["id"] for row in found] == [row["id"] for row in rows]
    assert [row["label"] for row in found] == [v.decode() for v in expected["label"]]
    np.testing.assert_allclose(
        [row["probabilities"] for row in found], expected["probabilities"], rtol=1e-5
    )
    assert len(list((output / "rows").iterdir())) == 7
    assert read_errors(output) == []


def test_bad_rows_are_told_apart_with_their_place_and_reason(
    run: Predict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"id": 1, "x": [1, 0]},
        "",
        '{"x": [1, NaN]}',
        '{"x": [1',
        {"id": 2, "x": [1, 0, 0]},
        {"id": 3, "x": ["a", "b"]},
        {"id": 4, "y": [1, 0]},
        {"id": 5, "x": [1e39, 0]},
        "[1, 0]",
        {"id": 6, "x": [0, 1]},
    ]
    source = write_lines(tmp_path / "in.jsonl", rows)
    output = run("colours/1", source, keep=["id"], rows_per_part=4)
    assert [(row["row"], row["label"]) for row in read_rows(output)] == [(1, "red"), (10, "green")]
    errors = read_errors(output)
    assert [(error["row"], error.get("id")) for error in errors] == [
        (3, None), (4, None), (5, 2), (6, 3), (7, 4), (8, 5), (9, None),
    ]  # fmt: skip
    assert errors[0]["where"] == f"{source}:3"
    reasons = [error["reason"] for error in errors]
    wanted = [
        "NaN is not a JSON number", "it is not JSON", "has 3 values, expected 2",
        "no FP32", "none of the model's inputs: x", "NaN or infinity", "expected an object",
    ]  # fmt: skip
    for reason, part in zip(reasons, wanted, strict=True):
        assert part in reason
    assert "2 rows in" in capsys.readouterr().out


def test_too_many_bad_rows_end_the_job_and_it_goes_on_with_a_higher_limit(
    run: Predict, tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "in.jsonl", ["oops", "oops", {"x": [1, 0]}, {"x": [0, 1]}])
    with pytest.raises(InputError, match=r"2 rows cannot .* max_bad_rows 1; the first is .*:1"):
        run("colours/1", source, rows_per_part=2, max_bad_rows=1)
    assert not (tmp_path / "out" / "errors.jsonl").exists()
    output = run("colours/1", source, rows_per_part=2, max_bad_rows=2)
    assert len(read_rows(output)) == len(read_errors(output)) == 2


def test_parquet_gives_the_same_answers_whatever_its_row_groups(
    run: Predict, tmp_path: Path, expected: dict[str, np.ndarray]
) -> None:
    table = pa.table({"key": np.arange(25), "point": X.tolist()})
    folder = tmp_path / "in"
    folder.mkdir()
    parquet.write_table(table.slice(0, 18), folder / "a.parquet", row_group_size=11)
    parquet.write_table(table.slice(18), folder / "b.parquet")
    options = {"columns": {"x": "point"}, "keep": ["key"], "rows_per_part": 4}
    output = run("colours/1", folder, **options)
    found = parquet.read_table(output / "rows")
    assert found["key"].to_pylist() == list(range(25))
    assert found["row"].to_pylist() == list(range(1, 26))
    assert found["label"].to_pylist() == [v.decode() for v in expected["label"]]

    whole = contents(output)
    for name in ("00001", "00006"):  # in the middle of a row group, and the last
        (output / "parts" / f"{name}.json").unlink()
        (output / "rows" / f"{name}.parquet").unlink()
    (output / "errors.jsonl").unlink()
    run("colours/1", folder, **options)
    assert contents(output) == whole


@pytest.mark.parametrize("change", ["input", "model", "config"])
def test_another_input_version_or_config_refuses_to_go_on(
    run: Predict, tmp_path: Path, change: str
) -> None:
    source = write_lines(tmp_path / "in.jsonl", [{"x": [1, 0]}])
    output = run("colours/1", source)
    before = contents(output)
    model, values = "colours/1", {}
    if change == "input":
        write_lines(source, [{"x": [0, 1]}])
    elif change == "model":
        model = "talker/1"
    else:
        values = {"batch_size": 5}
    with pytest.raises(ConflictError, match=f"holds a prediction with another {change}"):
        run(model, source, **values)
    assert contents(output) == before
    run("colours/1", write_lines(source, [{"x": [1, 0]}]), num_workers=2, max_bad_rows=0)


def test_an_input_that_changes_meanwhile_is_not_finished(
    run: Predict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_lines(tmp_path / "in.jsonl", [{"x": [1, 0]}] * 4)

    def and_change(output: object, *_arguments: object) -> None:
        with source.open("a") as file:
            file.write("\n")

    monkeypatch.setattr("jobs.prediction.output.Output.write_part", and_change)
    with pytest.raises(ConflictError, match=r"in\.jsonl' was changed while it was read"):
        run("colours/1", source)
    assert not (tmp_path / "out" / "errors.jsonl").exists()


def test_the_run_and_the_ledger_say_what_was_done_once(
    run: Predict, settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_lines(tmp_path / "in.jsonl", [{"x": [1, 0]}, "oops", {"x": [0, 1]}])
    for _ in range(2):
        run("colours/1", source, rows_per_part=1, tenant="acme")
    assert "3 of 3 parts are written already" in capsys.readouterr().out
    (used,) = Ledger(open_database(settings.database)).totals(tenant="acme")
    assert (used.kind, used.model, used.num_entries) == ("prediction", "colours", 3)
    assert used.cpu_s > 0
    client = open_client(settings)
    experiment = client.get_experiment_by_name("predict")
    runs = client.search_runs([experiment.experiment_id], "tags.model_version = 'colours/1'")
    (found,) = [each for each in runs if each.data.params["output"] == str(tmp_path / "out")]
    version = ModelRegistry.open(settings).resolve(ModelRef.parse("colours/1"))
    assert found.data.tags["model_digest"] == version.digest
    assert found.data.metrics["rows"] == 2
    assert found.data.metrics["bad_rows"] == 1
    (dataset,) = found.inputs.dataset_inputs
    assert (
        found.data.tags["dataset_digest"].removeprefix("sha256:").startswith(dataset.dataset.digest)
    )


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.jsonl", None, "does not exist"),
        ("empty.jsonl", "", "has no rows"),
        ("rows.csv", "x", "neither JSONL nor Parquet"),
        ("bad.parquet", "PAR1", "not whole Parquet"),
    ],
)
def test_an_input_that_cannot_be_read_is_one_line(
    run: Predict, tmp_path: Path, name: str, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        run("colours/1", tmp_path / name)
    assert "data.source" not in str(caught.value)


def test_check_says_how_much_there_is_and_writes_nothing(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_lines(tmp_path / "in.jsonl", [{"x": [1, 0]}, {"y": 1}, *[{"x": [0, 1]}] * 8])
    config = PredictConfig(
        model="colours/1", input=str(source), output=str(tmp_path / "out"), rows_per_part=4
    )
    check(config, settings)
    out = capsys.readouterr().out
    assert "10 rows of jsonl in 1 files" in out
    assert "3 parts" in out
    assert "in.jsonl:2 would be a bad row: the row has none of the model's inputs" in out
    assert "would predict with colours/1" in out
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_our_own_storage_is_named_without_its_address(
    run: Predict, settings: Settings, tmp_path: Path
) -> None:
    storage = Storage.open(settings.storage_root)
    storage.write_bytes("inputs/in.jsonl", b'{"x": [1, 0]}\n')
    run("colours/1", "storage://inputs/in.jsonl", "storage://predictions/one")
    assert b'"label": "red"' in storage.read_bytes("predictions/one/rows/00000.jsonl")
    with pytest.raises(InputError, match="is no place in our storage"):
        run("colours/1", "storage://../keys/in.jsonl")
