"""What makes no sense is refused before anything is loaded."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from cluster.errors import InputError
from cluster.model_package import Kind
from jobs.compression.config import CompressConfig, check_candidates


def config(*candidates: dict[str, Any]) -> CompressConfig:
    return CompressConfig(model="demo", candidates=candidates)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "method", "message"),
    [
        (
            "language_model",
            "int8_dynamic",
            "candidates.0: 'int8_dynamic' is for a package of kind 'graph', and demo/1 is of kind "
            "'language_model'; expected one of: int8_weights, int4_weights",
        ),
        (
            "graph",
            "int4_weights",
            "candidates.0: 'int4_weights' is for a package of kind 'language_model', and demo/1 is "
            "of kind 'graph'; expected one of: int8_dynamic, int8_static",
        ),
        ("adapter", "int8_weights", "demo/1 is of kind 'adapter'"),
    ],
)
def test_a_method_of_another_kind_is_named(kind: Kind, method: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        check_candidates(config({"method": method}), kind, "demo/1")
    assert message in str(caught.value)


def test_a_metric_that_the_kind_does_not_have_is_refused() -> None:
    values = {"model": "demo", "candidates": [{"method": "int8_weights"}], "metric": "log_loss"}
    with pytest.raises(InputError, match="metric 'log_loss' is not measured on a language model"):
        check_candidates(CompressConfig.model_validate(values), "language_model", "demo/1")


def test_the_same_candidate_twice_is_named() -> None:
    twice = config({"method": "int8_weights"}, {"method": "int8_weights", "group_size": 128})
    with pytest.raises(InputError, match=r"candidates.1: 'int8_weights-g128' stands there twice"):
        check_candidates(twice, "language_model", "demo/1")


def test_group_sizes_are_those_that_kernels_know() -> None:
    with pytest.raises(ValidationError, match="group_size"):
        config({"method": "int4_weights", "group_size": 48})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"schedule": {"kind": "cosine", "warmup_steps": 9}}, "warmup_steps 9 exceeds steps 5"),
        ({"optimizer": {"name": "muon"}}, "'muon' fills the zeros"),
        ({"sparsity": 1.0}, "less than 1"),
    ],
)
def test_a_training_that_could_not_be_is_refused(values: dict[str, Any], message: str) -> None:
    pruning = {"method": "prune", "structure": "unstructured", "sparsity": 0.5, "steps": 5}
    with pytest.raises(ValidationError, match=message):
        config({**pruning, **values})


def test_a_student_has_one_teacher() -> None:
    model = {"family": "causal_lm", "distillation": {"teacher": "another"}}
    with pytest.raises(ValidationError, match="give temperature and weight beside it"):
        config({"method": "distill", "steps": 5, "model": model})
