"""Replicas die and go under streams of tokens; the `openai` client notices nothing."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.replica_processes import cpu_seconds, replicas
from tests.stack import Stack
from tests.tiny_models import save_llama

pytestmark = [pytest.mark.stack, pytest.mark.timeout(180)]

TEXT = "The heliostat follows the sun and keeps its rays on one target. "
NUM_TOKENS = 500
GREEDY: dict[str, Any] = {"temperature": 0}
SEEDED: dict[str, Any] = {"temperature": 0.8, "seed": 5}
TWO_REPLICAS = "num_replicas: 2\n"
ONE_OR_TWO = """
autoscaling:
  min_replicas: 1
  max_replicas: 2
  target_ongoing_requests: 2
  upscale_delay_s: 0.2
  downscale_delay_s: 1
  look_back_s: 1
drain_s: 0
"""


@pytest.fixture(scope="module")
def talker(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model slow enough that its streams last for seconds, and sure of its words."""
    path = save_llama(
        tmp_path_factory.mktemp("models") / "slow-talker",
        TEXT,
        steps=12,
        hidden_size=512,
        num_hidden_layers=6,
        intermediate_size=1536,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=1024,
    )
    done = stack.run_cli("models", "import", path, "--name", "slow-talker")
    assert done.returncode == 0, done.stderr
    return "slow-talker"


@pytest.fixture
def deployed(
    stack: Stack, talker: str, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[str]:
    config = tmp_path / "options.yaml"
    config.write_text(request.param)
    done = stack.run_cli("deploy", talker, "--config", config)
    assert done.returncode == 0, done.stderr
    yield talker
    assert stack.run_cli("undeploy", talker).returncode == 0


class Reader(threading.Thread):
    """Reads one stream with the official client."""

    def __init__(self, stack: Stack, model: str, **options: Any) -> None:
        super().__init__(daemon=True)
        self._client = openai.OpenAI(
            base_url=f"{stack.settings.gateway_url}/v1", api_key=stack.key, max_retries=0
        )
        self._asked: dict[str, Any] = {
            "model": model,
            "prompt": TEXT,
            "max_tokens": NUM_TOKENS,
            "logit_bias": {"0": -100},
            "logprobs": 0,
            **options,
        }
        self._enough = threading.Event()
        self.text = ""
        self.tokens: list[str] = []
        self.reasons: list[str] = []
        self.num_completion_tokens = 0
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            chunks = self._client.completions.create(
                **self._asked, stream=True, stream_options={"include_usage": True}
            )
            for chunk in chunks:
                for choice in chunk.choices:
                    self.text += choice.text
                    self.tokens += choice.logprobs.tokens or [] if choice.logprobs else []
                    self.reasons += [choice.finish_reason] if choice.finish_reason else []
                if chunk.usage:
                    self.num_completion_tokens = chunk.usage.completion_tokens
                if self._enough.is_set():
                    chunks.close()
                    return
        except Exception as error:
            self.error = error

    def leave(self) -> None:
        self._enough.set()

    def wait_for(self, num_tokens: int) -> None:
        deadline_s = time.monotonic() + 40
        while len(self.tokens) < num_tokens:
            assert self.error is None, self.error
            assert time.monotonic() < deadline_s, f"{len(self.tokens)} tokens came"
            time.sleep(0.01)

    def result(self) -> tuple[str, list[str], list[str], int]:
        self.join(60)
        assert self.error is None, self.error
        return self.text, self.tokens, self.reasons, self.num_completion_tokens


def start(stack: Stack, model: str, *several: dict[str, Any]) -> list[Reader]:
    readers = [Reader(stack, model, **options) for options in several]
    for reader in readers:
        reader.start()
    return readers


def unbroken(stack: Stack, model: str, *several: dict[str, Any]) -> list[Any]:
    return [reader.result() for reader in start(stack, model, *several)]


def continuations(stack: Stack, words: str = "goes on elsewhere") -> list[str]:
    """What the gateway logged of them."""
    found = []
    for path in (stack.settings.home / "logs").rglob("*"):
        if path.is_file():
            lines = path.read_text(errors="replace").splitlines()
            found += [line for line in lines if words in line]
    return found


def charged(stack: Stack, model: str) -> int:
    """Completion tokens of a model in the ledger."""
    answer = httpx.get(
        f"{stack.settings.gateway_url}/v1/usage", headers={"authorization": f"Bearer {stack.key}"}
    )
    assert answer.status_code == 200, answer.text
    print(json.dumps(answer.json())[:2000])
    return 0


@pytest.mark.parametrize("deployed", [TWO_REPLICAS], indirect=True)
def test_a_replica_killed_under_streams_is_not_noticed(stack: Stack, deployed: str) -> None:
    expected = unbroken(stack, deployed, GREEDY, SEEDED)
    assert [reasons for _, _, reasons, _ in expected] == [["length"]] * 2
    application = f"{deployed}.v1"
    working = replicas(stack, application, 2)
    readers = start(stack, deployed, GREEDY, SEEDED)
    for reader in readers:
        reader.wait_for(40)
    begun = {process: cpu_seconds(process) for process in working}
    time.sleep(0.3)
    busiest = max(working, key=lambda process: cpu_seconds(process) - begun[process])
    busiest.kill()
    assert [reader.result() for reader in readers] == expected
    print(continuations(stack))
    charged(stack, deployed)
