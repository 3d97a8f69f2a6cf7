"""The model card says what a version is, in what MLflow can keep."""

from __future__ import annotations

from cluster.model_package import FileEntry, Golden, LanguageModelInfo, Lineage, Manifest
from cluster.model_package.card import MAX_CHARACTERS, model_card, version_tags

MANIFEST = Manifest(
    kind="language_model",
    name="pydoc|lm",
    created_at="now",
    files={f"model/m-{n}.json": FileEntry(sha256="0" * 64, size_bytes=7) for n in range(500)},
    golden=Golden(inputs={}, outputs={}),
    metrics={"loss": 3.25},
    language_model=LanguageModelInfo(
        architecture="LlamaForCausalLM", max_context_tokens=512, vocab_size=9, num_parameters=7_654
    ),
    lineage=Lineage(source="jobs.train", git_commit="abc", parent_digest="sha256:1"),
)


def test_a_card_names_origin_size_and_quality() -> None:
    card = model_card("sha256:2", MANIFEST)
    for text in ("sha256:2", "jobs.train", "abc", "sha256:1", "7,654", "512 tokens", "3.25"):
        assert text in card
    assert len(card) <= MAX_CHARACTERS
    assert "heliostat models verify talker/3`" in model_card("sha256:2", MANIFEST, ref="talker/3")


def test_a_card_says_what_was_made_of_its_parent() -> None:
    derived = {
        "quantisation": {"method": "int8_dynamic", "num_bits": 8},
        "parity": {"largest_difference": 0.0123456, "tolerance": 0.1},
    }
    card = model_card("sha256:2", MANIFEST.model_copy(update=derived))
    for text in ("| num bits | 8 |", "int8_dynamic", "| largest difference | 0.0123 |"):
        assert text in card
    assert "Quantisation" not in model_card("sha256:2", MANIFEST)


def test_tags_leave_out_what_is_not_known() -> None:
    tags = version_tags("sha256:2", MANIFEST, "there")
    assert tags["heliostat.parent"] == "sha256:1"
    assert "heliostat.dataset" not in tags
