"""The table of model families.

family = make_family(CnnConfig(family="cnn"), DataShape.of(dataset.info))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jobs.models.causal_lm import CausalLm
from jobs.models.cnn import Cnn
from jobs.models.config import ModelConfig, PretrainedLmConfig
from jobs.models.family import DataShape, Family
from jobs.models.pretrained import PretrainedLm
from jobs.models.tabular import linear_regression, logistic_regression, mlp


def _causal_lm(config: Any, shape: DataShape) -> Family:
    given = isinstance(config, PretrainedLmConfig)
    return PretrainedLm(config, shape) if given else CausalLm(config, shape)


FAMILIES: dict[str, Callable[[Any, DataShape], Family]] = {
    "causal_lm": _causal_lm,
    "cnn": Cnn,
    "linear_regression": linear_regression,
    "logistic_regression": logistic_regression,
    "mlp": mlp,
}


def make_family(config: ModelConfig, shape: DataShape) -> Family:
    """Raises InputError if the data does not suit the family."""
    return FAMILIES[config.family](config, shape)
