"""From a model of one's own and a file of conversations to an assistant that answers over HTTP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml

from cluster.model_package import open_version
from cluster.model_ref import ModelRef
from cluster.registry import ModelRegistry
from tests.stack import Stack
from tests.tiny_models import CHAT_TEMPLATE, save_llama

pytestmark = pytest.mark.stack

ANSWER = "It follows the sun."


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Supervised fine-tuning by LoRA, merged, on conversations that all have one answer."""
    (tmp_path / "template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    with (tmp_path / "chat.jsonl").open("w", encoding="utf-8") as file:
        for number in range(60):
            turns = [("user", f"What does mirror {number} do?"), ("assistant", ANSWER)]
            messages = [{"role": role, "content": content} for role, content in turns]
            file.write(json.dumps({"messages": messages}) + "\n")
    tokenizer = {
        "kind": "existing",
        "path": "mirror-base@candidate",
        "chat_template": str(tmp_path / "template.jinja"),
    }
    values: dict[str, Any] = {
        "name": "mirror-helper",
        "data": {
            "name": "mirrors",
            "source": {"kind": "chat", "paths": [str(tmp_path / "chat.jsonl")]},
            "text": {"tokenizer": tokenizer, "sequence_length": 64},
        },
        "model": {
            "family": "causal_lm",
            "base": "mirror-base@candidate",
            "lora": {"rank": 8, "alpha": 32, "merge": True},
        },
        "optimizer": {"learning_rate": 1e-2},
        "steps": 50,
        "batch_size": 8,
        "num_workers": 1,
    }
    path = tmp_path / "sft.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def test_a_fine_tuned_base_answers_chats_by_its_template(
    stack: Stack, config: Path, tmp_path: Path
) -> None:
    base_dir = save_llama(tmp_path / "base", "The sun rises; the mirror follows it. " * 3, steps=60)
    for arguments in (
        ("models", "import", str(base_dir), "--name", "mirror-base"),
        ("submit", "train", "--config", str(config)),
        ("deploy", "mirror-helper@candidate"),
    ):
        done = stack.run_cli(*arguments)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    registry = ModelRegistry.open(stack.settings)
    base = registry.resolve(ModelRef("mirror-base", alias="candidate"))
    version = registry.resolve(ModelRef("mirror-helper", alias="candidate"))
    assert (version.kind, version.parent_digest) == ("language_model", base.digest)
    assert open_version(version, stack.settings).manifest.parity
    client = openai.OpenAI(
        base_url=f"{stack.settings.gateway_url}/v1", api_key=stack.key, max_retries=0
    )
    answer = client.chat.completions.create(
        model="mirror-helper",
        messages=[{"role": "user", "content": "What does mirror 7 do?"}],
        max_tokens=40,
        temperature=0,
    )
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].finish_reason == "stop"
