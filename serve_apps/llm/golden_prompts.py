"""A package's golden prompts as requests to an engine.

requests = golden_requests(package)
check_answers(package, completions, precision="float32")
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cluster.model_package import ModelPackage, golden
from serve_apps.llm.engine import EngineRequest, Sampling

_ROUNDING = {"float32": 1, "float16": 3, "bfloat16": 20, "int8": 50}
"""How much further from the fp32 reference a logit may be."""


def golden_requests(
    package: ModelPackage, *, prefix: str = "", adapter: str | None = None
) -> list[EngineRequest]:
    """One for each golden prompt, continued greedily; their ids are `prefix` and a number."""
    inputs: Any = package.manifest.golden.inputs
    sampling = Sampling(
        max_tokens=int(inputs["max_new_tokens"]),
        temperature=0,
        eos_token_ids=golden.end_tokens(package.manifest),
    )
    return [
        EngineRequest(f"{prefix}{number}", tuple(map(int, prompt)), sampling, adapter=adapter)
        for number, prompt in enumerate(inputs["prompts"])
    ]


def check_answers(
    package: ModelPackage, completions: Sequence[Sequence[int]], *, precision: str
) -> None:
    """Raises ParityError where the answers are not the golden ones."""
    tolerance = package.manifest.golden.tolerance * _ROUNDING[precision]
    golden.check_language_model(package.manifest, completions, tolerance=tolerance)
