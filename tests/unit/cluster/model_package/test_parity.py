"""A derived model is certified against its parent, or refused with one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cluster.errors import ParityError
from cluster.model_package import PublishedPackage
from cluster.model_package.parity import certify, graph_outputs, token_logits
from cluster.runtimes.onnx import OnnxRuntime

PARENT = {"score": np.array([[1.0, -4.0]], np.float32), "label": np.array([1])}


def changed(**outputs: list[object]) -> dict[str, np.ndarray]:
    return {**PARENT, **{name: np.array(values) for name, values in outputs.items()}}


def test_the_certificate_states_the_largest_difference_and_what_was_allowed() -> None:
    parity = certify(PARENT, changed(score=[[1.25, -4.0]]), 0.1)
    assert parity == {"largest_difference": 0.25, "tolerance": 0.4}
    assert certify(PARENT, PARENT, 0.0) == {"largest_difference": 0.0, "tolerance": 0.0}


@pytest.mark.parametrize(
    ("derived", "message"),
    [
        (changed(score=[[1.5, -4.0]]), "'score' differs by 0.5, expected at most 0.4"),
        (changed(score=[[np.nan, -4.0]]), "'score' differs by nan"),
        (changed(score=[[np.inf, -4.0]]), "'score' differs by inf"),
        (changed(label=[0]), "'label' differs"),
        (changed(score=[[1.0]]), r"'score' has shape \[1, 1\], expected \[1, 2\]"),
        (changed(extra=[1]), "it gives extra, label, score, expected label, score"),
    ],
)
def test_what_is_further_off_is_refused(derived: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(ParityError, match=message) as caught:
        certify(PARENT, derived, 0.1)
    assert "\n" not in str(caught.value)


def test_infinities_and_nans_that_the_parent_gives_too_are_no_difference() -> None:
    outputs = {"score": np.array([-np.inf, np.nan, 2.0], np.float32)}
    assert certify(outputs, outputs, 0.1)["tolerance"] == pytest.approx(0.2)


def test_a_graph_is_replayed_on_the_golden_inputs_of_its_parent(
    published: PublishedPackage,
) -> None:
    runtime = OnnxRuntime(Path(published.location) / "model/model.onnx")
    outputs = graph_outputs(published.manifest, runtime.run)
    # Pre-processing doubles x, and the labels that post-processing adds are no output of the graph.
    golden = np.array(published.manifest.golden.outputs["logits"])
    assert outputs.keys() == {"logits"}
    np.testing.assert_allclose(outputs["logits"], golden)


def test_a_language_model_is_compared_after_every_token_of_each_prompt(
    language_model_dir: Path,
) -> None:
    from cluster.model_package.language_model import load_reference

    model = load_reference(language_model_dir)
    outputs = token_logits(model, [[1, 2, 3], [4]])
    assert [row.shape[0] for row in outputs.values()] == [3, 1]
    model.get_input_embeddings().weight.data *= 1.5
    with pytest.raises(ParityError, match="logits of prompt 0"):
        certify(outputs, token_logits(model, [[1, 2, 3], [4]]), 0.01)
