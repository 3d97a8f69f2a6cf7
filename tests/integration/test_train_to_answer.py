"""A whole life on the shared stack: `heliostat demo` trains, deploys and calls two models.

The demo runs once; the tests then look at what it left, through the clients that users have.
"""

from __future__ import annotations

import base64
import io
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from cluster.model_ref import ModelRef
from cluster.registry import ModelRegistry, ModelVersion
from tests.stack import Stack
from tests.tiny_models import save_llama

CHINESE = "定日镜跟随太阳，把光线一直照在同一个目标上。🌞"

pytestmark = [pytest.mark.stack, pytest.mark.timeout(420)]


@dataclass(frozen=True)
class Life:
    """What the demo printed, and the stack it ran on."""

    stack: Stack
    output: str

    def version(self, name: str) -> ModelVersion:
        return ModelRegistry.open(self.stack.settings).resolve(ModelRef(name, alias="candidate"))


@pytest.fixture(scope="module")
def life(stack: Stack) -> Life:
    demo = stack.run_cli("demo", "--fast", timeout_s=400)
    assert demo.returncode == 0, f"{demo.stdout[-3000:]}\n{demo.stderr[-3000:]}"
    return Life(stack, demo.stdout)


@pytest.fixture(scope="module")
def client(stack: Stack) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{stack.settings.gateway_url}/v1", api_key=stack.key, max_retries=0
    )


@pytest.fixture(scope="module")
def http(stack: Stack) -> Iterator[httpx.Client]:
    with httpx.Client(
        base_url=stack.settings.gateway_url,
        headers={"Authorization": f"Bearer {stack.key}"},
        timeout=60,
    ) as session:
        yield session


def row(output: str, title: str) -> list[str]:
    (line,) = re.findall(rf"^\s*{title}\s+(.*)$", output, re.MULTILINE)
    return line.split()


def test_the_demo_prints_answers_beside_what_they_should_be(life: Life) -> None:
    written = row(life.output, "written")
    from_numbers = row(life.output, "answered, from numbers")
    from_pictures = row(life.output, "answered, from PNG pictures")
    assert len(written) == 10
    assert from_numbers == from_pictures
    assert sum(a == b for a, b in zip(written, from_numbers, strict=True)) >= 8
    assert "validation loss" in life.output
    assert life.stack.key in life.output


def test_the_demo_prints_the_verified_lineage_of_what_it_served(life: Life) -> None:
    origin = life.output.partition("Where the answers came from")[2]
    for name, data in (("digits", "digits"), ("pydoc-lm", "python_topics")):
        version = life.version(name)
        assert version.run_id is not None
        part = origin.partition(str(version.ref))[2]
        package, dataset, commit, run = part.splitlines()[1:5]
        assert re.match(rf"\s+package\s+verified\s+{version.digest}  \(.*signed by key", package)
        assert re.match(rf"\s+dataset\s+verified\s+sha256:[0-9a-f]{{64}}  \({data}, ", dataset)
        assert re.match(r"\s+commit\s+(verified|recorded)\s+[0-9a-f]{40}", commit)
        assert version.run_id in run


def test_digits_are_read_well(life: Life) -> None:
    metrics = run_of(life, "digits").data.metrics
    assert metrics["test/accuracy"] >= 0.97
    assert {"test/precision", "test/recall", "test/f1"} <= metrics.keys()


def run_of(life: Life, name: str) -> Any:
    from mlflow import MlflowClient

    run_id = life.version(name).run_id
    assert run_id is not None
    return MlflowClient(life.stack.settings.tracking_uri).get_run(run_id)


def test_the_run_says_what_made_the_model(life: Life) -> None:
    run = run_of(life, "pydoc-lm")
    assert run.info.status == "FINISHED"
    assert run.data.params["optimizer.learning_rate"] == "0.003"
    assert run.data.tags["dataset_digest"].startswith("sha256:")
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", run.data.tags["git_commit"])
    assert run.data.tags["submission_id"]
    assert run.data.metrics["validation/loss"] > 0
    assert any(name.startswith("system/") for name in run.data.metrics)


def test_training_again_reuses_the_finished_run(life: Life) -> None:
    before = life.version("digits")
    again = life.stack.run_cli(
        "submit", "train", "--config", "configs/train/digits.yaml", "--set", "resume=reuse"
    )
    assert again.returncode == 0, again.stderr
    assert "already trained" in again.stdout
    assert life.version("digits") == before


def test_the_plain_ray_command_submits_as_well(life: Life) -> None:
    run = life.stack.run_shell(
        'eval "$(heliostat env)" && ray job submit --working-dir . -- '
        "python -m jobs.evaluate --config configs/evaluate/digits.yaml"
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    assert "accuracy" in run.stdout


def test_a_picture_and_its_numbers_get_the_same_answer(life: Life, http: httpx.Client) -> None:
    images = load_digits().images[:4]
    numbers = {
        "name": "pixels",
        "datatype": "FP32",
        "shape": [4, 64],
        "data": images.ravel().tolist(),
    }
    pictures = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(np.round(image * 255 / 16).astype(np.uint8)).save(buffer, format="PNG")
        pictures.append(base64.b64encode(buffer.getvalue()).decode())
    raw = {"name": "image", "datatype": "BYTES", "shape": [4], "data": pictures}
    answers = [
        http.post("/v2/models/digits/infer", json={"inputs": [tensor]}).raise_for_status().json()
        for tensor in (numbers, raw)
    ]
    labels = [
        next(output["data"] for output in answer["outputs"] if output["name"] == "label")
        for answer in answers
    ]
    assert labels[0] == labels[1] == ["0", "1", "2", "3"]


def test_text_streams_to_the_openai_client(life: Life, client: openai.OpenAI) -> None:
    assert "pydoc-lm" in [model.id for model in client.models.list()]
    request: dict[str, Any] = {
        "model": "pydoc-lm", "prompt": "The import statement", "max_tokens": 12, "temperature": 0,
    }  # fmt: skip
    whole = client.completions.create(**request)
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 12
    chunks = client.completions.create(
        **request, stream=True, stream_options={"include_usage": True}
    )
    received = list(chunks)
    text = "".join(choice.text for chunk in received for choice in chunk.choices)
    assert text == whole.choices[0].text
    assert received[-1].usage == whole.usage
    prompts = [request["prompt"], "The guard"]
    several = client.completions.create(**{**request, "prompt": prompts}, n=2)
    assert len(several.choices) == 4
    assert {choice.text for choice in several.choices[:2]} == {text}


def test_chinese_text_streams_without_splitting_a_character(
    life: Life, client: openai.OpenAI, tmp_path: Path
) -> None:
    """A model whose tokens are single bytes, so that every character is three or four of them."""
    save_llama(tmp_path / "model", CHINESE, steps=150)
    for arguments in (
        ("models", "import", str(tmp_path / "model"), "--name", "chinese"),
        ("deploy", "chinese"),
    ):
        done = life.stack.run_cli(*arguments)
        assert done.returncode == 0, done.stderr
    pieces = [
        choice.text
        for chunk in client.completions.create(
            model="chinese", prompt=CHINESE[:3], max_tokens=100, temperature=0, stream=True
        )
        for choice in chunk.choices
    ]
    assert "".join(pieces) == CHINESE[3:]
    assert all("\ufffd" not in piece for piece in pieces)
    assert sum(bool(piece) for piece in pieces) > 5


def test_a_wrong_key_and_an_unknown_model_are_told_in_the_protocols_words(
    life: Life, http: httpx.Client
) -> None:
    base_url = f"{life.stack.settings.gateway_url}/v1"
    stranger = openai.OpenAI(base_url=base_url, api_key="hst_wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    friend = openai.OpenAI(base_url=base_url, api_key=life.stack.key, max_retries=0)
    with pytest.raises(openai.NotFoundError, match="nothing-like-it"):
        friend.completions.create(model="nothing-like-it", prompt="a")
    answer = http.post("/v2/models/nothing-like-it/infer", json={"inputs": []})
    assert answer.status_code == 404
    assert "nothing-like-it" in answer.json()["error"]


def test_a_tampered_package_is_refused_and_the_old_version_goes_on(
    life: Life, http: httpx.Client, language_model_dir: Path
) -> None:
    imported = life.stack.run_cli(
        "models", "import", language_model_dir, "--name", "tampered", "--json"
    )
    assert imported.returncode == 0, imported.stderr
    version = ModelRegistry.open(life.stack.settings).resolve(ModelRef("tampered", version=1))
    weights = Path(version.location) / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.chmod(0o600)
    weights.write_bytes(content)
    verify = life.stack.run_cli("models", "verify", "tampered/1")
    assert verify.returncode == 1
    assert "model.safetensors" in verify.stderr
    deploy = life.stack.run_cli("deploy", "tampered/1")
    assert deploy.returncode == 1
    assert "model.safetensors" in deploy.stderr
    assert "Traceback" not in deploy.stderr + deploy.stdout
    assert http.get("/v2/models/digits/ready").status_code == 200
    assert http.get("/v2/models/tampered/ready").status_code == 404


def test_a_second_version_is_switched_to_and_rolled_back(life: Life, http: httpx.Client) -> None:
    train = life.stack.run_cli(
        "submit", "train", "--config", "configs/train/digits.yaml",
        "--set", "steps=30", "--set", "seed=1",
    )  # fmt: skip
    assert train.returncode == 0, train.stdout[-2000:] + train.stderr
    assert life.stack.run_cli("deploy", "digits@candidate").returncode == 0
    wait_for_version(http, "digits", "2")
    rollback = life.stack.run_cli("releases", "rollback", "digits")
    assert rollback.returncode == 0, rollback.stderr
    wait_for_version(http, "digits", "1")
    history = json.loads(life.stack.run_cli("models", "history", "digits", "--json").stdout)
    moves = [(e["from_version"], e["to_version"]) for e in history if e["alias"] == "champion"]
    assert moves == [(None, 1), (1, 2), (2, 1)] or moves == [(2, 1), (1, 2), (None, 1)]
    assert all(e["actor"] and e["reason"] and e["at"] for e in history)


def wait_for_version(http: httpx.Client, name: str, version: str) -> None:
    """Until the gateway has read the new routing row; every answer on the way is a good one."""
    tensor = {
        "name": "pixels",
        "datatype": "FP32",
        "shape": [1, 64],
        "data": load_digits().data[0].tolist(),
    }
    for _ in range(100):
        answer = http.post(f"/v2/models/{name}/infer", json={"inputs": [tensor]})
        if answer.raise_for_status().json()["model_version"] == version:
            return
        time.sleep(0.05)
    raise AssertionError(f"{name} is still not answered by version {version}")
