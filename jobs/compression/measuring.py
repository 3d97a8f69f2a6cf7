"""How small, how good, how fast and how near to its parent a compressed model is.

Speed is measured of two models in turns, so that what else the machine does slows both.

    size_bytes(package)
    quality_of(evaluation.metrics, "error_rate")
    interleaved(ours=generate_int8, theirs=generate, rounds=5).ratio
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.errors import InputError
from cluster.model_package import ModelPackage, parity
from cluster.model_package.files import list_files
from cluster.processing import postprocess, preprocess
from jobs.compression.config import QualityMetric
from jobs.data.dataset import Dataset
from jobs.evaluation.graph import client_inputs
from jobs.models import sparsity

Work = Callable[[], int]
"""Does some work and says how many units of it."""

_TURN_S = 0.2
_NEW_TOKENS = 32


def size_bytes(package: ModelPackage) -> int:
    """Bytes of the model's files."""
    return sum(list_files(package.model_dir).values())


def density_of(package: ModelPackage) -> float:
    """Share of the weights that are not zero; of a graph they are not counted."""
    return 1.0 if package.manifest.kind == "graph" else sparsity.density_of(package.model_dir)


def choose_metric(metrics: Mapping[str, float], wanted: QualityMetric | None) -> QualityMetric:
    """The metric that the budget is of.

    Raises:
        InputError: the evaluation does not give it.
    """
    there: list[QualityMetric] = [
        *(name for name in ("loss", "log_loss", "mse") if name in metrics),
        *(("error_rate",) if "accuracy" in metrics else ()),
    ]
    if wanted is None:
        return there[0]
    if wanted not in there:
        raise InputError(
            f"metric '{wanted}' is not measured on this model and data",
            hint=f"expected one of: {', '.join(there)}",
            param="metric",
        )
    return wanted


def quality_of(metrics: Mapping[str, float], metric: QualityMetric) -> float:
    """Lower is better."""
    return 1 - metrics["accuracy"] if metric == "error_rate" else metrics[metric]


@dataclass(frozen=True)
class Speeds:
    """Units per second of two works."""

    ours: float
    theirs: float
    ratio: float
    """The median over turns, not that of the two medians."""


def interleaved(ours: Work, theirs: Work, rounds: int) -> Speeds:
    """Medians over turns that follow each other; a turn lasts 0.2 s or one call."""
    ours()
    theirs()
    turns = [(_turn(ours), _turn(theirs)) for _ in range(rounds)]
    return Speeds(
        statistics.median(mine for mine, _ in turns),
        statistics.median(other for _, other in turns),
        statistics.median(mine / other for mine, other in turns),
    )


def _turn(work: Work) -> float:
    begun_at, num_units = time.perf_counter(), 0
    while True:
        num_units += work()
        seconds = time.perf_counter() - begun_at
        if seconds >= _TURN_S:
            return num_units / seconds


class GraphProbe:
    """A loaded graph: what it answers, and how fast. Its speed is in rows, one to a request."""

    unit = "requests"

    def __init__(self, package: ModelPackage, dataset: Dataset, split: str, num_threads: int):
        from cluster.runtimes.onnx import OnnxRuntime

        self._manifest = package.manifest
        self._runtime = OnnxRuntime(package.graph_path, num_threads=num_threads)
        self._inputs = client_inputs(package, dataset, split, np.arange(1))

    def outputs(self) -> parity.Outputs:
        return parity.graph_outputs(self._manifest, self._runtime.run)

    def work(self) -> int:
        """One request, as a client would meet it."""
        postprocess(self._manifest, self._runtime.run(preprocess(self._manifest, self._inputs)))
        return 1


class LanguageModelProbe:
    """A loaded language model: what it answers, and how fast. Its speed is in generated tokens."""

    unit = "tokens"

    def __init__(self, package: ModelPackage, num_threads: int) -> None:
        import torch

        from cluster.model_package.language_model import load_reference

        torch.set_num_threads(num_threads)
        self._model: Any = load_reference(package.model_dir)
        self._prompts = parity.golden_prompts(package.manifest)
        assert package.manifest.language_model is not None, "its manifest describes it"
        room = package.manifest.language_model.max_context_tokens - len(self._prompts[0])
        self._num_new = max(1, min(_NEW_TOKENS, room))

    def outputs(self) -> parity.Outputs:
        return parity.token_logits(self._model, self._prompts)

    def work(self) -> int:
        """One greedy answer to the first golden prompt."""
        import torch

        ids = torch.tensor([self._prompts[0]])
        with torch.inference_mode():
            self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=self._num_new,
                max_new_tokens=self._num_new,
                do_sample=False,
                pad_token_id=0,
            )
        return self._num_new


Probe = GraphProbe | LanguageModelProbe


def make_probe(package: ModelPackage, dataset: Dataset, split: str, num_threads: int) -> Probe:
    """Load a model to try it."""
    if package.manifest.kind == "graph":
        return GraphProbe(package, dataset, split, num_threads)
    return LanguageModelProbe(package, num_threads)
