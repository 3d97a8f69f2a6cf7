"""Golden outputs are reproduced by the right runtime and by no other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.errors import ParityError
from cluster.model_package import (
    Golden,
    LanguageModelInfo,
    LocalSigner,
    Manifest,
    ModelPackage,
    PublishedPackage,
    TrustStore,
    golden,
    open_package,
    write_package,
)
from cluster.runtimes.onnx import OnnxRuntime
from cluster.storage import Storage


@pytest.fixture
def package(
    published: PublishedPackage, storage: Storage, trust: TrustStore, cache_dir: Path
) -> ModelPackage:
    return open_package(published.digest, storage=storage, trust=trust, cache_dir=cache_dir)


def test_a_graph_replays(package: ModelPackage) -> None:
    golden.replay(package)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda outputs: {"logits": outputs["logits"] + 0.01},
        lambda outputs: {"logits": outputs["logits"][:, ::-1]},
        lambda outputs: {"logits": outputs["logits"][:1]},
        lambda outputs: {"logits": outputs["logits"] * np.nan},
    ],
)
def test_another_runtime_is_caught(
    package: ModelPackage, spoil: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    runtime = OnnxRuntime(package.graph_path)
    with pytest.raises(ParityError, match="expected"):
        golden.check_graph(package.manifest, lambda inputs: spoil(runtime.run(inputs)))


def test_rounding_is_not_a_difference(package: ModelPackage) -> None:
    runtime = OnnxRuntime(package.graph_path)
    golden.check_graph(
        package.manifest, lambda inputs: {"logits": runtime.run(inputs)["logits"] + 1e-6}
    )


def test_a_language_model_replays(
    llama_dir: Path, storage: Storage, keys_dir: Path, trust: TrustStore, cache_dir: Path
) -> None:
    published = write_package(
        llama_dir,
        name="m",
        kind="language_model",
        storage=storage,
        signer=LocalSigner(keys_dir),
        golden_inputs=["the lazy dog", "fox"],
    )
    opened = open_package(published.digest, storage=storage, trust=trust, cache_dir=cache_dir)
    golden.replay(opened)
    assert len(golden.end_tokens(opened.manifest)) == 1


LANGUAGE_MODEL = Manifest(
    kind="language_model",
    name="m",
    created_at="now",
    files={},
    language_model=LanguageModelInfo(
        architecture="x", max_context_tokens=8, vocab_size=9, num_parameters=1, eos_token_ids=(0,)
    ),
    golden=Golden(
        inputs={"prompts": [[1], [2]], "max_new_tokens": 3},
        outputs={
            "completions": [[5, 6, 7], [8, 0]],
            "margins": [[1.0, 0.1, 1.0], [1.0, 1.0]],
            "first_logits": [{"ids": [5], "values": [2.0]}, {"ids": [8], "values": [3.0]}],
        },
        tolerance=0.1,
    ),
)
LOGITS = [np.full(9, 2.05), np.full(9, 3.0)]


@pytest.mark.parametrize(
    "completions",
    [
        [[5, 6, 7], [8, 0]],
        [[5, 6, 7], [8]],
        [[5, 1, 1], [8]],
    ],
    ids=["the same", "without the end token", "the other of two equal tokens"],
)
def test_what_another_engine_may_say(completions: list[list[int]]) -> None:
    golden.check_language_model(LANGUAGE_MODEL, completions, LOGITS)


@pytest.mark.parametrize(
    ("completions", "message"),
    [
        ([[1, 6, 7], [8]], "prompt 0, token 0 is 1, expected 5"),
        ([[5, 6, 1], [8]], "prompt 0, token 2"),
        ([[5, 6, 7], [8, 3]], "prompt 1, token 1 is 3, expected None"),
        ([[5, 6, 7], []], "prompt 1, token 0 is None"),
        ([[5, 6, 7]], "1 answers"),
    ],
)
def test_what_no_engine_may_say(completions: list[list[int]], message: str) -> None:
    with pytest.raises(ParityError, match=message):
        golden.check_language_model(LANGUAGE_MODEL, completions)


def test_wrong_logits_are_caught_and_a_wider_tolerance_is_obeyed() -> None:
    logits = [np.full(9, 2.0), np.full(9, 3.5)]
    with pytest.raises(ParityError, match="logits after prompt 1"):
        golden.check_language_model(LANGUAGE_MODEL, [[5, 6, 7], [8]], logits)
    golden.check_language_model(LANGUAGE_MODEL, [[5, 6, 7], [8]], logits, tolerance=0.5)
