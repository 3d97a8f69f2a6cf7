"""What answers rows, whatever kind of model it is.

predictor = open_predictor(version, config, settings)
(prepared,) = predictor.prepare([Row(1, "rows.jsonl:1", {"pixels": [0, 5, …]})])
answers = predictor.answer([prepared])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.errors import InputError
from cluster.model_package import ModelPackage, open_base, open_digest
from cluster.settings import Settings
from jobs.prediction.config import PredictConfig
from jobs.prediction.rows import Row, Values

KINDS = ("graph", "language_model", "adapter")


@dataclass(frozen=True)
class Answer:
    """What the model says to one row."""

    values: Values
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True)
class Prepared:
    """A row that can be answered."""

    work: Any
    """As the predictor that made it understands it."""
    max_tokens: int = 0
    """What it may use at most, its prompt included."""


class Predictor(Protocol):
    """A loaded model with its processing."""

    def prepare(self, rows: Sequence[Row]) -> list[Prepared | InputError]:
        """Each row as the model takes it, or why it does not."""

    def answer(self, prepared: Sequence[Prepared]) -> list[Answer | InputError]:
        """An answer for each, or why it gets none."""


def open_predictor(digest: str, config: PredictConfig, settings: Settings) -> Predictor:
    """Fetch, verify and load a package.

    Raises:
        InputError: it is of a kind that predicts nothing, or takes no such columns.
    """
    package = open_digest(digest, settings)
    require_kind(package.manifest.kind)
    if package.manifest.kind == "graph":
        from jobs.prediction.graph import GraphPredictor

        return GraphPredictor(package, config)
    from jobs.prediction.language_model import TextPredictor

    return TextPredictor(package, _load_language_model(package, settings), config)


def require_kind(kind: str) -> None:
    """Raises InputError for packages that answer nothing by themselves."""
    if kind not in KINDS:
        raise InputError(
            f"a package of kind '{kind}' predicts nothing",
            hint=f"expected one of: {', '.join(KINDS)}",
            param="model",
        )


def _load_language_model(package: ModelPackage, settings: Settings) -> object:
    from cluster.model_package.adapter import load_merged
    from cluster.model_package.language_model import load_reference

    if package.manifest.kind == "adapter":
        return load_merged(open_base(package, settings).model_dir, package.model_dir)
    return load_reference(package.model_dir)
