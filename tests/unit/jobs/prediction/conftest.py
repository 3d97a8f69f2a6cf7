"""Two registered models, and how a test predicts with them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from cluster.config import parse_config
from cluster.settings import Settings
from jobs.predict import predict
from jobs.prediction.config import PredictConfig
from tests.registered_models import register_models


@pytest.fixture(scope="package")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """`colours/1` and `talker/1`; MLflow is a file, and no cluster is up."""
    home = tmp_path_factory.mktemp("predict")
    return register_models(home).model_copy(update={"ray_port": 1})


Predict = Callable[..., Path]


@pytest.fixture
def run(settings: Settings, tmp_path: Path) -> Predict:
    """Predict into `tmp_path / "out"`, or into another folder; returns it."""

    def run(
        model: str, source: Path | str, output: Path | str | None = None, **values: Any
    ) -> Path:
        output = output or tmp_path / "out"
        values = {"model": model, "input": str(source), "output": str(output), **values}
        predict(parse_config(values, PredictConfig, source="test"), settings)
        return Path(output)

    return run


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    """JSONL; what is text already stands as it is."""
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def read_rows(output: Path) -> list[dict[str, Any]]:
    """All answers, in the order of their parts."""
    files = sorted((output / "rows").glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def read_errors(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "errors.jsonl").read_text().splitlines()]


def contents(output: Path) -> dict[str, bytes]:
    """Every file of an output but the one that says whose work it is."""
    files = (path for path in output.rglob("*") if path.is_file() and path.name != "run.json")
    return {str(path.relative_to(output)): path.read_bytes() for path in files}
