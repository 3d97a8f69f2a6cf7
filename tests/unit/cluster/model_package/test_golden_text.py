"""A tokenizer or a chat template that is read otherwise than its author saw is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ParityError
from cluster.model_package.golden_text import check_text, compute_text
from cluster.model_package.manifest import Golden, LanguageModelInfo, Manifest
from cluster.processing.text import TextProcessor
from tests.tiny_models import CHAT_TEMPLATE, save_llama


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_llama(tmp_path_factory.mktemp("model"), "Hello heliostat, hello world")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return directory


def manifest_of(inputs: dict[str, Any], outputs: dict[str, Any]) -> Manifest:
    info = LanguageModelInfo(
        architecture="x", max_context_tokens=8, vocab_size=9, num_parameters=1, eos_token_ids=(0,)
    )
    golden = Golden(inputs=inputs, outputs=outputs)
    return Manifest(
        kind="language_model",
        name="m",
        created_at="now",
        files={},
        language_model=info,
        golden=golden,
    )


@pytest.fixture(scope="module")
def manifest(model_dir: Path) -> Manifest:
    inputs, outputs = compute_text(TextProcessor.load(model_dir))
    assert len(inputs["chats"]) == len(outputs["chat_texts"]) == 2
    return manifest_of(inputs, outputs)


def test_what_is_read_the_same_passes(manifest: Manifest, model_dir: Path) -> None:
    check_text(manifest, TextProcessor.load(model_dir))
    # And so does a package of before there were golden texts.
    check_text(manifest_of({"prompts": [[1]]}, {}), TextProcessor.load(model_dir))


def change_vocabulary(directory: Path) -> None:
    values = json.loads((directory / "tokenizer.json").read_text())
    vocabulary = values["model"]["vocab"]
    vocabulary["H"], vocabulary["w"] = vocabulary["w"], vocabulary["H"]
    (directory / "tokenizer.json").write_text(json.dumps(values))


def change_decoder(directory: Path) -> None:
    values = json.loads((directory / "tokenizer.json").read_text())
    values["decoder"] = {"type": "Fuse"}
    (directory / "tokenizer.json").write_text(json.dumps(values))


def change_template(directory: Path) -> None:
    template = directory / "chat_template.jinja"
    template.write_text(CHAT_TEMPLATE.replace(": ", ":", 1))


def refuse_everything(directory: Path) -> None:
    (directory / "chat_template.jinja").write_text("{{ 1 / 0 }}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_vocabulary, r"token ids of text 0 differs at 0: \[\d+, .*expected \[\d+, "),
        (change_decoder, r"text of tokens 0 differs at 6: 'Ġ.*', expected ' "),
        (change_template, r"rendered conversation 0 differs at 5: 'Hello!.*, expected ' Hello!"),
        (refuse_everything, "do not fit .* the chat template refuses these messages: division"),
    ],
)
def test_what_is_read_otherwise_is_refused_with_the_first_difference(
    manifest: Manifest, model_dir: Path, tmp_path: Path, change: Any, message: str
) -> None:
    directory = tmp_path / "changed"
    shutil.copytree(model_dir, directory)
    change(directory)
    with pytest.raises(ParityError, match=message):
        check_text(manifest, TextProcessor.load(directory))


def test_golden_texts_of_another_shape_are_refused(manifest: Manifest, model_dir: Path) -> None:
    broken = manifest_of(
        dict(manifest.golden.inputs), dict(manifest.golden.outputs) | {"text_ids": 3}
    )
    with pytest.raises(ParityError, match="do not fit"):
        check_text(broken, TextProcessor.load(model_dir))


def test_a_template_that_takes_no_system_message_has_the_other_conversation(
    model_dir: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "strict"
    shutil.copytree(model_dir, directory)
    check = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    (directory / "chat_template.jinja").write_text(check + CHAT_TEMPLATE)
    inputs, outputs = compute_text(TextProcessor.load(directory))
    assert [chat[0]["role"] for chat in inputs["chats"]] == ["user"]
    check_text(manifest_of(inputs, outputs), TextProcessor.load(directory))
