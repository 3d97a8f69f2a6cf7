"""A batch on the stack: made by OpenAI's client, run by a job that stands back, read back."""

from __future__ import annotations

import json
import time
from pathlib import Path

import openai
import psutil
import pytest

from tests.stack import Stack
from tests.tiny_models import CHAT_TEMPLATE, save_llama

pytestmark = pytest.mark.stack

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def model(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A deployed chat model."""
    directory = save_llama(tmp_path_factory.mktemp("model"), "Once upon a time")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    for verb in (("models", "import", directory, "--name", "batched"), ("deploy", "batched/1")):
        run = stack.run_cli(*verb)
        assert run.returncode == 0, run.stdout + run.stderr
    return "batched"


def niceness_of(pattern: str) -> set[int]:
    """Of all threads of the running processes whose command has these words."""
    found: set[int] = set()
    for process in psutil.process_iter():
        try:
            if pattern in " ".join(process.cmdline()):
                threads = Path(f"/proc/{process.pid}/task").iterdir()
                found |= {psutil.Process(int(thread.name)).nice() for thread in threads}
        except (psutil.Error, OSError):
            continue
    return found


def test_a_batch_is_answered_beside_live_traffic(stack: Stack, model: str) -> None:
    client = openai.OpenAI(base_url=f"{stack.settings.gateway_url}/v1", api_key=stack.key)
    body = {"model": model, "max_tokens": 8, "temperature": 0}
    lines = [
        {
            "custom_id": f"r{n}",
            "method": "POST",
            "url": CHAT,
            "body": {**body, "messages": [{"role": "user", "content": f"number {n % 7}"}]},
        }
        for n in range(200)
    ]
    lines[3]["body"] = {**body, "messages": []}
    text = "\n".join(map(json.dumps, lines)).encode()
    file = client.files.create(file=("night.jsonl", text), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
    deadline = time.monotonic() + 120
    workers: set[int] = set()
    while (now := client.batches.retrieve(batch.id)).status not in ("completed", "failed"):
        assert time.monotonic() < deadline, stack.run_cli("jobs", "list").stdout
        workers |= niceness_of("(_PoolWorker)")
        time.sleep(0.1)
    assert now.status == "completed", stack.run_cli("jobs", "logs", f"{batch.id}-0").stdout
    assert now.request_counts is not None
    assert (now.request_counts.completed, now.request_counts.failed) == (199, 1)
    assert now.output_file_id is not None
    assert 19 in workers

    answers = [
        json.loads(line) for line in client.files.content(now.output_file_id).text.splitlines()
    ]
    assert [answer["custom_id"] for answer in answers] == [f"r{n}" for n in range(200) if n != 3]
    found = {answer["custom_id"]: answer["response"]["body"] for answer in answers}
    for number in (0, 5):
        live = client.chat.completions.create(**lines[number]["body"])
        message = found[f"r{number}"]["choices"][0]["message"]
        assert message["content"] == live.choices[0].message.content
    jobs = json.loads(stack.run_cli("jobs", "list", "--json").stdout)
    (job,) = [job for job in jobs if job["id"].startswith(batch.id)]
    assert (job["verb"], job["status"]) == ("predict", "SUCCEEDED")
    usage = stack.run_cli("usage").stdout
    assert "prediction" in usage
