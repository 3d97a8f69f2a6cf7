"""Models of other tools come in, are served in another form, and go out again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnxruntime
import pandas as pd
import pytest
import skops.io
import yaml
from sklearn.compose import ColumnTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from tests.stack import Stack

pytestmark = pytest.mark.stack


def succeed(stack: Stack, *arguments: str | Path) -> str:
    done = stack.run_cli(*arguments)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    return done.stdout


def infer(stack: Stack, model: str, inputs: list[dict[str, Any]]) -> dict[str, Any]:
    answer = httpx.post(
        f"{stack.settings.gateway_url}/v2/models/{model}/infer",
        json={"inputs": inputs},
        headers={"Authorization": f"Bearer {stack.key}"},
        timeout=30,
    )
    assert answer.status_code == 200, answer.text
    return {output["name"]: output["data"] for output in answer.json()["outputs"]}


def test_a_pipeline_of_mixed_columns_answers_over_http(stack: Stack, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    frame = pd.DataFrame(
        {"age": generator.uniform(20, 80, 60), "city": generator.choice(["Bern", "Zürich"], 60)}
    )
    answers = np.where((frame["age"] > 50) == (frame["city"] == "Bern"), "stay", "leave")
    columns = ColumnTransformer(
        [("age", StandardScaler(), ["age"]), ("city", OneHotEncoder(), ["city"])]
    )
    model = Pipeline([("columns", columns), ("model", LogisticRegression())]).fit(frame, answers)
    skops.io.dump(model, tmp_path / "churn.skops")
    succeed(stack, "models", "import", tmp_path / "churn.skops", "--name", "churn")
    succeed(stack, "deploy", "churn@candidate")
    rows = frame.head(3)
    found = infer(
        stack,
        "churn",
        [
            {"name": "age", "datatype": "FP32", "shape": [3, 1], "data": rows["age"].tolist()},
            {"name": "city", "datatype": "BYTES", "shape": [3, 1], "data": rows["city"].tolist()},
        ],
    )
    assert found["label"] == model.predict(rows).tolist()
    np.testing.assert_allclose(
        np.reshape(found["probabilities"], (3, 2)), model.predict_proba(rows), atol=1e-4
    )


def test_a_language_model_is_exported_served_and_taken_out_as_a_graph(
    stack: Stack, language_model_dir: Path, tmp_path: Path
) -> None:
    config = tmp_path / "export.yaml"
    config.write_text(yaml.safe_dump({"model": "told@candidate", "name": "scorer", "to": "onnx"}))
    succeed(stack, "models", "import", language_model_dir, "--name", "told")
    told = succeed(stack, "submit", "export", "--config", config)
    assert "told/1 exported to ONNX" in told
    succeed(stack, "deploy", "scorer@candidate")
    succeed(stack, "models", "export", "scorer@champion", "--to", tmp_path / "out")
    ids = [5, 6, 7, 8]
    sent = {"name": "input_ids", "datatype": "INT64", "shape": [2, 2], "data": ids}
    found = infer(stack, "scorer", [sent])["logits"]
    session = onnxruntime.InferenceSession(tmp_path / "out/model.onnx")
    (expected,) = session.run(None, {"input_ids": np.reshape(ids, (2, 2)).astype(np.int64)})
    np.testing.assert_allclose(np.reshape(found, expected.shape), expected, atol=1e-4)
