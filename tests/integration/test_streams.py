"""Replicas die and go under streams of tokens; the `openai` client notices nothing."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from psutil import Process

from cluster.admin_client import AdminClient
from cluster.session.ray_head import auth_header
from cluster.session.record import read_record
from tests.replica_processes import cpu_seconds, replicas
from tests.stack import Stack
from tests.tiny_models import save_llama

pytestmark = [pytest.mark.stack, pytest.mark.timeout(180)]

TEXT = "The heliostat follows the sun and keeps its rays on one target. "
NUM_TOKENS = 500
GREEDY: dict[str, Any] = {"temperature": 0}
SEEDED: dict[str, Any] = {"temperature": 0.8, "seed": 5}
ONE_OR_TWO = """
autoscaling:
  min_replicas: 1
  max_replicas: 2
  target_ongoing_requests: 2
  upscale_delay_s: 0.2
  downscale_delay_s: 5
  look_back_s: 1
drain_s: 0
"""


@pytest.fixture(scope="module")
def talker_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model slow enough that its streams last for seconds, and sure of its words."""
    return save_llama(
        tmp_path_factory.mktemp("models") / "slow-talker",
        TEXT,
        steps=12,
        hidden_size=512,
        num_hidden_layers=6,
        intermediate_size=1536,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=8192,
    )


@pytest.fixture(scope="module")
def talker(stack: Stack, talker_dir: Path) -> str:
    done = stack.run_cli("models", "import", talker_dir, "--name", "slow-talker")
    assert done.returncode == 0, done.stderr
    return "slow-talker"


@pytest.fixture
def deployed(
    stack: Stack, talker: str, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[str]:
    deploy(stack, talker, tmp_path, request.param)
    yield talker
    assert stack.run_cli("undeploy", talker).returncode == 0


def deploy(stack: Stack, model: str, directory: Path, options: str) -> None:
    (directory / "options.yaml").write_text(options)
    done = stack.run_cli("deploy", model, "--config", directory / "options.yaml")
    assert done.returncode == 0, done.stderr


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


def results(readers: list[Reader]) -> list[tuple[str, list[str], list[str], int]]:
    return [reader.result() for reader in readers]


def continuations(stack: Stack, why: str) -> int:
    """How many the gateway logged."""
    scratch_dir = read_record(stack.settings.home).scratch_dir
    assert scratch_dir is not None
    logs = (scratch_dir / "ray" / "session_latest" / "logs").glob("worker-*.err")
    lines = [line for path in logs for line in path.read_text(errors="replace").splitlines()]
    return sum("goes on elsewhere" in line and why in line for line in lines)


def charged(stack: Stack, model: str) -> tuple[int, int]:
    """Requests and completion tokens of a model in the ledger."""
    headers = {"authorization": f"Bearer {stack.key}"}
    answer = httpx.get(f"{stack.settings.gateway_url}/v1/usage", headers=headers)
    rows = [row for row in answer.json()["data"] if row["model"] == model]
    return sum(r["requests"] for r in rows), sum(r["completion_tokens"] for r in rows)


def assert_charged(stack: Stack, model: str, expected: tuple[int, int]) -> None:
    """Soon: the gateway hands in its counts about once a second."""
    deadline_s = time.monotonic() + 10
    while (found := charged(stack, model)) != expected:
        assert time.monotonic() < deadline_s, found
        time.sleep(0.2)
    time.sleep(1.5)
    assert charged(stack, model) == expected


@pytest.mark.parametrize("deployed", ["num_replicas: 2\n"], indirect=True)
def test_a_replica_killed_under_streams_is_not_noticed(stack: Stack, deployed: str) -> None:
    expected = results(start(stack, deployed, GREEDY, SEEDED))
    assert [reasons for _, _, reasons, _ in expected] == [["length"]] * 2
    assert_several_answers_to_one_request(stack, deployed)
    working = replicas(stack, f"{deployed}.v1", 2)
    readers = start(stack, deployed, GREEDY, SEEDED)
    for reader in readers:
        reader.wait_for(40)
    begun = {process: cpu_seconds(process) for process in working}
    time.sleep(0.2)
    busiest = max(working, key=lambda process: cpu_seconds(process) - begun[process])
    busiest.kill()
    assert results(readers) == expected
    assert continuations(stack, "went away under the request") >= 1
    assert_charged(stack, deployed, (7, 4 * NUM_TOKENS + 8 * 6))
    assert_one_replica_answers(stack, deployed)


def assert_several_answers_to_one_request(stack: Stack, model: str) -> None:
    """They are asked for at once: to Serve, calls of one HTTP request look alike."""
    client = openai.OpenAI(
        base_url=f"{stack.settings.gateway_url}/v1", api_key=stack.key, max_retries=0
    )
    asked: dict[str, Any] = {"model": model, "max_tokens": 6, "logit_bias": {"0": -100}}
    prompts = [TEXT, "The sun"]
    alone = [client.completions.create(prompt=p, **asked, **SEEDED) for p in prompts]
    several = client.completions.create(prompt=prompts, n=3, **asked, **SEEDED)
    assert len(several.choices) == 6
    assert [c.text for c in several.choices[::3]] == [a.choices[0].text for a in alone]


def assert_one_replica_answers(stack: Stack, model: str) -> None:
    """One after the other, prompts with the same beginning go where it is in the cache."""
    wait_until(lambda: num_replicas(stack, model) == 2)
    working = replicas(stack, f"{model}.v1", 2)
    begun = [cpu_seconds(process) for process in working]
    for number in range(8):
        asked = {"prompt": "Once upon a time " * 8 + str(number), "max_tokens": 40}
        results(start(stack, model, GREEDY | asked))
    used_s = sorted(cpu_seconds(p) - s for p, s in zip(working, begun, strict=True))
    assert used_s[0] < 0.3 * used_s[1], used_s


@pytest.mark.parametrize("deployed", [ONE_OR_TWO], indirect=True)
def test_streams_of_a_replica_that_scales_down_go_on(stack: Stack, deployed: str) -> None:
    long = GREEDY | {"max_tokens": 8000}
    load = start(stack, deployed, *[long] * 4)
    wait_until(lambda: num_replicas(stack, deployed) == 2)
    for reader in load:
        reader.leave()
        reader.join()
    # Each replica has a stream, and one of the two has to go.
    readers = one_stream_on_each(replicas(stack, f"{deployed}.v1", 2), stack, deployed, long)
    wait_until(lambda: continuations(stack, "has to go") > 0)
    for reader in readers:
        reader.wait_for(len(reader.tokens) + 50)
        reader.leave()
    first, second = (reader.tokens for reader in readers)
    num_both = min(len(first), len(second))
    assert first[:num_both] == second[:num_both]


def test_streams_outlive_their_version_while_a_replica_is_left(
    stack: Stack, talker: str, tmp_path: Path
) -> None:
    """`undeploy` lets them end, and the same; where their last replica dies, an error ends them."""
    deploy(stack, talker, tmp_path, "request_timeout_s: 5\n")
    (replica,) = replicas(stack, f"{talker}.v1", 1)
    expected = results(start(stack, talker, GREEDY, SEEDED))
    endless = GREEDY | {"max_tokens": 8000}
    *readers, left_alone = start(stack, talker, GREEDY, SEEDED, endless)
    for reader in (*readers, left_alone):
        reader.wait_for(20)
    admin = AdminClient.open(stack.settings)
    admin.undeploy(talker, None)
    wait_until(lambda: applications(stack)[f"{talker}.v1"]["status"] == "DELETING")
    assert not any(reader.reasons for reader in readers), "they ended too soon to tell"
    assert results(readers) == expected

    assert left_alone.is_alive()
    replica.kill()
    left_alone.join(30)
    assert isinstance(left_alone.error, openai.APIError), left_alone.error
    num_both = min(len(left_alone.tokens), NUM_TOKENS)
    assert left_alone.tokens[:num_both] == expected[0][1][:num_both]
    wait_until(lambda: not any(row["name"] == talker for row in admin.deployments()))


# The last one: afterwards the bare name means another version.
@pytest.mark.parametrize("deployed", ["drain_s: 0\n"], indirect=True)
def test_no_stream_breaks_while_versions_take_each_others_place(
    stack: Stack, talker_dir: Path, deployed: str
) -> None:
    expected = results(start(stack, deployed, GREEDY, SEEDED))
    done = stack.run_cli("models", "import", talker_dir, "--name", deployed)
    assert done.returncode == 0, done.stderr
    found = []
    with ThreadPoolExecutor(1) as pool:
        released = pool.submit(stack.run_cli, "deploy", f"{deployed}/2")
        while not released.done():
            found += [results(start(stack, deployed, GREEDY, SEEDED))]
    assert released.result().returncode == 0, released.result().stderr
    readers = start(stack, deployed, GREEDY, SEEDED)
    for reader in readers:
        reader.wait_for(40)
    back = stack.run_cli("releases", "rollback", deployed)
    assert back.returncode == 0, back.stderr
    found += [results(readers), results(start(stack, deployed, GREEDY, SEEDED))]
    assert found == [expected] * len(found), "it is the same model"


def one_stream_on_each(
    both: list[Process], stack: Stack, model: str, asked: dict[str, Any]
) -> list[Reader]:
    """Streams that the two replicas generate, after more and more of them."""
    readers: list[Reader] = []
    found: list[Reader] = []
    idle = list(both)
    time.sleep(0.5)  # until nothing is computed for those that left
    for _ in range(12):
        begun_s = {process: cpu_seconds(process) for process in idle}
        readers += start(stack, model, asked)
        readers[-1].wait_for(80)  # enough for some hundredths of a second, which is what is counted
        busy = [process for process in idle if cpu_seconds(process) > begun_s[process] + 0.05]
        idle = [process for process in idle if process not in busy]
        found += readers[-1:] if busy else []
        if not idle:
            break
    for reader in readers:
        if reader not in found:
            reader.leave()
            reader.join()
    assert len(found) == 2, f"no stream goes to {idle}"
    return found


def num_replicas(stack: Stack, model: str) -> int:
    """Running replicas."""
    (deployment,) = applications(stack)[f"{model}.v1"]["deployments"].values()
    return Counter(replica["state"] for replica in deployment["replicas"])["RUNNING"]


def applications(stack: Stack) -> dict[str, Any]:
    """As Ray's own dashboard tells them."""
    url = f"{stack.settings.dashboard_url}/api/serve/applications/"
    found: dict[str, Any] = httpx.get(url, headers=auth_header(stack.settings)).json()
    return found["applications"]  # type: ignore[no-any-return]


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
