"""Files and batches, as OpenAI's own client sees them; the jobs are real."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import threading
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import uvicorn
from starlette.applications import Starlette

from cluster.batches import Batch, BatchStore
from cluster.config import parse_config
from cluster.database import open_database
from cluster.errors import HeliostatError, MachineError
from cluster.ledger import Ledger
from cluster.model_package import open_version
from cluster.model_ref import ModelRef
from cluster.processing.text import TextProcessor
from cluster.registry import ModelRegistry
from cluster.releases import ReleaseStore
from cluster.security.api_keys import ApiKeys
from cluster.security.audit import AuditLog
from cluster.security.leases import LeaseStore
from cluster.settings import Settings
from cluster.storage import Storage
from cluster.submission import JobState
from cluster.tenant_files import TenantFiles
from jobs.predict import predict
from jobs.prediction.config import PredictConfig
from serve_apps.gateway.app import load_model
from serve_apps.gateway.asgi import GatewayConfig, GatewayParts, build_asgi
from serve_apps.gateway.backend import InProcessBackend
from serve_apps.gateway.batches.driver import BatchDriver, BatchParts
from serve_apps.gateway.batches.runner import JobRunner, ProcessRunner
from serve_apps.gateway.batches.work import BatchOptions
from serve_apps.gateway.catalogue import ModelCatalogue, ServedModel
from serve_apps.gateway.http.openapi import undescribed
from serve_apps.gateway.models import Models
from serve_apps.gateway.openai.schema import TextLimits
from serve_apps.gateway.routing_table import Routes, RoutingTable, ServedVersion
from tests.registered_models import register_models
from tests.unit.serve_apps.conftest import FakeControl
from tests.unit.serve_apps.gateway.http.test_openapi import violations

CHAT = "/v1/chat/completions"
OPTIONS = BatchOptions(poll_s=0.02, lease_s=1, rows_per_part=2, batch_size=2, nice=0)


class ThreadRunner:
    """Jobs as threads of this process: real ones, without the seconds of a process's start."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._states: dict[str, JobState] = {}
        self.is_paused = False
        self.failures = 0
        self.started: list[tuple[str, dict[str, Any]]] = []

    def start(self, job_id: str, config: Mapping[str, Any]) -> None:
        if job_id in self._states:
            return
        self._states[job_id] = "running"
        self.started.append((job_id, dict(config)))
        if not self.is_paused:
            threading.Thread(target=self._run, args=(job_id, config)).start()

    def state(self, job_id: str) -> JobState:
        return self._states.get(job_id, "unknown")

    def stop(self, job_id: str) -> None:
        self._states[job_id] = "failed"

    def _run(self, job_id: str, config: Mapping[str, Any]) -> None:
        if self.failures:
            self.failures -= 1
            self._states[job_id] = "failed"
            return
        try:
            predict(parse_config(dict(config), PredictConfig, source="test"), self._settings)
            self._states[job_id] = "succeeded"
        except HeliostatError:
            self._states[job_id] = "failed"


@dataclass
class House:
    """A gateway over registered models, and what tests look at behind it."""

    app: Starlette
    settings: Settings
    runner: Any
    parts: BatchParts

    def load(self, version: ServedVersion) -> ServedModel:
        return load_model(version, self.settings)

    def tokens(self, text: str) -> int:
        """How many a text is to the chat model."""
        package = open_version(
            ModelRegistry.open(self.settings).resolve(ModelRef.parse("talker/1")), self.settings
        )
        return len(TextProcessor.load(package.model_dir).encode(text))

    def client(
        self, tenant: str = "acme", scope: str = "infer", models: list[str] | None = None
    ) -> openai.AsyncOpenAI:
        keys = ApiKeys(open_database(self.settings.database))
        key = keys.create(tenant, [scope], models=models).key
        http = httpx.AsyncClient(transport=httpx.ASGITransport(self.app))
        return openai.AsyncOpenAI(
            api_key=key, base_url="http://gateway/v1", http_client=http, max_retries=0
        )


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return register_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def settings(registered: Settings, tmp_path: Path) -> Settings:
    """A home of the test's own, with the same models and MLflow."""
    home = tmp_path / "home"
    home.mkdir()
    open_database(registered.database).dispose()
    for name in ("heliostat.db", "keys", "storage"):
        copy = shutil.copytree if (registered.home / name).is_dir() else shutil.copy
        copy(registered.home / name, home / name)
    return registered.model_copy(update={"home": home, "ray_port": 1})


def build(
    settings: Settings,
    runner: JobRunner,
    *,
    options: BatchOptions = OPTIONS,
    max_file_bytes: int = 10_000,
) -> House:
    registry = ModelRegistry.open(settings)
    served: dict[tuple[str, int], ServedVersion] = {}
    for name in ("colours", "talker", "vectors"):
        version = registry.resolve(ModelRef.parse(f"{name}/1"))
        served[name, 1] = ServedVersion(name, 1, version.digest, f"{name}.v1")
    routes = Routes(served=served, weights={name: {1: 1.0} for name, _ in served})
    database = open_database(settings.database)
    storage = Storage.open(settings.storage_root)
    parts = BatchParts(
        TenantFiles(database, storage),
        BatchStore(database),
        storage,
        runner,
        options,
    )
    app = build_asgi(
        GatewayParts(
            verify=ApiKeys(database).verify,
            read_routes=lambda: routes,
            load_model=lambda version: load_model(version, settings),
            backend=InProcessBackend(),
            control=FakeControl(),
            audit=AuditLog(database).record,
            exchange=LeaseStore(database).exchange,
            totals=Ledger(database).totals,
            add_evidence=ReleaseStore(database).add_evidence,
            config=GatewayConfig(max_body_bytes=4096, max_file_bytes=max_file_bytes),
            batches=parts,
        )
    )
    return House(app, settings, runner, parts)


@pytest.fixture
async def house(settings: Settings) -> AsyncIterator[House]:
    house = build(settings, ThreadRunner(settings))
    async with house.app.router.lifespan_context(house.app):
        yield house
    open_database(settings.database).dispose()


def line(custom_id: str, url: str = CHAT, model: str = "talker", **body: Any) -> dict[str, Any]:
    if url == CHAT:
        body = {"messages": [{"role": "user", "content": custom_id}], **body}
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": url,
        "body": {"model": model, "max_tokens": 4, **body},
    }


async def upload(client: openai.AsyncOpenAI, lines: list[Any], name: str = "in.jsonl") -> str:
    text = "\n".join(each if isinstance(each, str) else json.dumps(each) for each in lines)
    return (await client.files.create(file=(name, text.encode()), purpose="batch")).id


async def create(
    client: openai.AsyncOpenAI, lines: list[Any], endpoint: Any = CHAT, **values: Any
) -> Any:
    return await client.batches.create(
        input_file_id=await upload(client, lines),
        endpoint=endpoint,
        completion_window="24h",
        **values,
    )


async def until(client: openai.AsyncOpenAI, batch_id: str, *statuses: str) -> Any:
    deadline = time.monotonic() + 60
    while (batch := await client.batches.retrieve(batch_id)).status not in statuses:
        assert time.monotonic() < deadline, batch
        await asyncio.sleep(0.02)
    return batch


async def read_lines(client: openai.AsyncOpenAI, file_id: str | None) -> list[dict[str, Any]]:
    if file_id is None:
        return []
    content = await client.files.content(file_id)
    return [json.loads(each) for each in content.text.splitlines()]


async def test_a_chat_batch_is_answered_line_by_line(house: House) -> None:
    client = house.client()
    lines = [
        line("first"),
        line("greedy", temperature=0, max_tokens=6),
        line("long", max_tokens=500),
        line("tools", tools=[{"type": "function"}]),
        "",
        line("scored", logprobs=True),
        line("定日镜", temperature=0, stop=["\n"]),
    ]
    created = await create(client, lines, metadata={"night": "7"})
    assert (created.status, created.metadata) == ("validating", {"night": "7"})
    assert created.expires_at - created.created_at == 86_400
    done = await until(client, created.id, "completed", "failed")
    assert done.status == "completed", done
    counts = done.request_counts
    assert (counts.total, counts.completed, counts.failed) == (6, 3, 3)
    assert done.created_at <= done.in_progress_at <= done.finalizing_at <= done.completed_at

    answers = {each["custom_id"]: each for each in await read_lines(client, done.output_file_id)}
    assert list(answers) == ["first", "greedy", "定日镜"]
    response = answers["greedy"]["response"]
    assert (response["status_code"], answers["greedy"]["error"]) == (200, None)
    completion = openai.types.chat.ChatCompletion.model_validate(response["body"])
    assert completion.model == "talker"
    assert completion.choices[0].message.content
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 6

    errors = await read_lines(client, done.error_file_id)
    assert [each["custom_id"] for each in errors] == ["long", "tools", "scored"]
    assert [each["response"]["status_code"] for each in errors] == [400, 400, 400]
    messages = [each["response"]["body"]["error"]["message"] for each in errors]
    for message, part in zip(
        messages, ["the model holds 128", "'tools' is not", "'logprobs' is not"], strict=True
    ):
        assert part in message

    usage = [each["response"]["body"]["usage"] for each in answers.values()]
    assert done.usage.total_tokens == sum(each["total_tokens"] for each in usage)
    (used,) = Ledger(open_database(house.settings.database)).totals(tenant="acme")
    assert (used.kind, used.model, used.num_requests) == ("prediction", "talker", 3)
    assert used.completion_tokens == sum(each["completion_tokens"] for each in usage)
    assert used.prompt_tokens == sum(each["prompt_tokens"] for each in usage)
    assert house.parts.storage.list("batches") == []


async def test_a_completion_batch_takes_text_and_tokens(house: House) -> None:
    client = house.client()
    url = "/v1/completions"
    lines = [
        line("text", url, prompt="Once", temperature=0),
        line("ids", url, prompt=[79, 110, 99], temperature=0.5, seed=-3),
        line("one", url, prompt=["Once"], temperature=0),
        line("many", url, prompt=["Once", "upon"], n=3, temperature=1, seed=4),
        line("penalised", url, prompt="Once", temperature=0, frequency_penalty=2),
        line("held", url, prompt="Once", max_tokens=8, structured_outputs={"regex": "(sun|moon)!"}),
        line("wrong", url, prompt="Once", structured_outputs={"regex": "("}),
        line("long", url, prompt=["Once", "x" * 200], temperature=0),
        line("none", url, prompt=[]),
    ]
    done = await until(client, (await create(client, lines, url)).id, "completed", "failed")
    found = await read_lines(client, done.output_file_id)
    bodies = [openai.types.Completion.model_validate(each["response"]["body"]) for each in found]
    assert [each["custom_id"] for each in found] == [
        "text", "ids", "one", "many", "penalised", "held",
    ]  # fmt: skip
    assert bodies[5].choices[0].text in ("sun!", "moon!")
    assert bodies[0].choices[0].text == bodies[2].choices[0].text != bodies[4].choices[0].text
    choices = bodies[3].choices
    assert [choice.index for choice in choices] == list(range(6))
    assert len({choice.text for choice in choices}) > 3
    usage = bodies[3].usage
    assert usage is not None
    assert usage.prompt_tokens * 3 == sum(
        house.tokens(prompt) for prompt in ("Once", "upon") for _ in range(3)
    )
    assert usage.completion_tokens == 24
    counts = done.request_counts
    assert (counts.total, counts.completed, counts.failed) == (9, 6, 3)
    wrong, long, none = await read_lines(client, done.error_file_id)
    assert wrong["response"]["body"]["error"]["param"] == "structured_outputs.regex"
    assert "the model holds 128" in long["response"]["body"]["error"]["message"]
    assert "'prompt' is empty" in none["response"]["body"]["error"]["message"]


async def test_an_embedding_batch_gives_the_vectors_of_live_requests(house: House) -> None:
    client = house.client()
    url = "/v1/embeddings"

    def embed(custom_id: str, **body: Any) -> dict[str, Any]:
        body = {"model": "vectors", **body}
        return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}

    lines = [
        embed("one", input=[1, 2, 3]),
        embed("several", input=[[4], [5, 6], [7]]),
        embed("base64", input=[1, 2, 3], encoding_format="base64"),
        embed("text", input="Hello"),
    ]
    done = await until(client, (await create(client, lines, url)).id, "completed", "failed")
    found = await read_lines(client, done.output_file_id)
    bodies = {each["custom_id"]: each["response"]["body"] for each in found}
    vectors = {name: [e["embedding"] for e in body["data"]] for name, body in bodies.items()}
    assert vectors["one"] == [[6.0, 3.0]]
    assert vectors["several"] == [[4.0, 1.0], [11.0, 2.0], [7.0, 1.0]]
    assert vectors["base64"] == [base64.b64encode(np.array([6, 3], "<f4").tobytes()).decode()]
    assert bodies["several"]["usage"] == {"prompt_tokens": 4, "total_tokens": 4}
    (used,) = Ledger(open_database(house.settings.database)).totals(tenant="acme")
    assert (used.prompt_tokens, used.num_requests, done.usage.input_tokens) == (10, 5, 10)
    openai.types.CreateEmbeddingResponse.model_validate(bodies["several"])
    (refused,) = await read_lines(client, done.error_file_id)
    assert "has no tokenizer" in refused["response"]["body"]["error"]["message"]


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        ("{", "invalid_json_line"),
        ({**line("b"), "custom_id": 7}, "missing_required_parameter"),
        ({**line("b"), "method": "GET"}, "invalid_method"),
        ({**line("b"), "url": "/v1/completions"}, "mismatched_endpoint"),
        (line("a"), "duplicate_custom_id"),
        (line("b", model="colours"), "mismatched_model"),
        ({**line("b"), "body": []}, "missing_required_parameter"),
    ],
)
async def test_a_file_that_is_no_batch_fails_and_names_the_line(
    house: House, wrong: Any, code: str
) -> None:
    client = house.client()
    failed = await until(client, (await create(client, [line("a"), wrong])).id, "failed")
    (error,) = failed.errors.data
    assert (error.code, error.line) == (code, 2)
    assert error.message.startswith("line 2: ")
    assert failed.output_file_id is None
    assert house.runner.started == []


async def test_what_cannot_be_a_batch_is_refused_at_once(house: House) -> None:
    client = house.client()
    file_id = await upload(client, [line("a")])

    async def refused(error: type[openai.APIStatusError], **values: Any) -> str:
        asked = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"} | values
        with pytest.raises(error) as caught:
            await client.batches.create(**asked)
        return str(caught.value)

    bad, missing = openai.BadRequestError, openai.NotFoundError
    assert "takes no batches" in await refused(bad, endpoint="/v1/moderations")
    assert "completion_window" in await refused(bad, completion_window="1h")
    assert "metadata" in await refused(bad, metadata={"k": "v" * 600})
    assert "output_expires_after" in await refused(
        bad, output_expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert "there is no file" in await refused(missing, input_file_id="file-none")
    other = await upload(client, [line("a", model="absent")])
    assert "'absent' is not deployed" in await refused(missing, input_file_id=other)
    graph = await upload(client, [line("a", model="colours")])
    assert "generates no text" in await refused(bad, input_file_id=graph)
    narrow = house.client(models=["colours"])
    with pytest.raises(openai.NotFoundError, match="not for this key"):
        await narrow.batches.create(input_file_id=file_id, endpoint=CHAT, completion_window="24h")
    blank = await upload(client, ["", ""])
    assert "has no requests" in await refused(bad, input_file_id=blank)
    assert (await client.batches.list()).data == []
    assert house.runner.started == []


async def test_every_route_is_described_and_needs_a_key(house: House) -> None:
    assert undescribed(house.app.routes) == []
    http = house.client()._client
    for path in ("files", "files/file-1", "files/file-1/content", "batches", "batches/batch_1"):
        assert (await http.get(f"http://gateway/v1/{path}")).status_code == 401
    for path in ("files", "batches", "batches/batch_1/cancel"):
        assert (await http.post(f"http://gateway/v1/{path}")).status_code == 401


async def test_no_request_breaks_the_contract(house: House) -> None:
    server = uvicorn.Server(uvicorn.Config(house.app, port=0, log_level="error", lifespan="off"))
    serving = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    key = house.client().api_key
    async with httpx.AsyncClient() as http:
        headers = {"authorization": f"Bearer {key}"}
        document = (await http.get(f"{url}/openapi.json", headers=headers)).json()
    ours = ("/v1/files", "/v1/batches")
    document["paths"] = {k: v for k, v in document["paths"].items() if k.startswith(ours)}
    # Which files there are is not for a schema to say.
    checks = {"positive_data_acceptance": {"enabled": False}}
    found = await asyncio.to_thread(violations, document, url, key, checks)
    server.should_exit = True
    await serving
    assert not found, "\n".join(found)


async def test_files_come_back_whole_and_are_listed_and_deleted(house: House) -> None:
    client = house.client()
    first = await client.files.create(file=("../../etc/\x1bpasswd", b"\x00\r\n--x" * 400),
                                      purpose="batch")  # fmt: skip
    assert (first.filename, first.bytes, first.purpose) == ("passwd", 2400, "batch")
    assert (await client.files.content(first.id)).content == b"\x00\r\n--x" * 400
    empty = await client.files.create(file=("empty", b""), purpose="batch")
    third = await upload(client, [line("a")])
    listed = [file.id async for file in client.files.list(limit=1)]
    assert sorted(listed) == sorted([first.id, empty.id, third])
    oldest = await client.files.list(order="asc", limit=1)
    assert oldest.data[0].id == first.id
    assert (await client.files.list(purpose="batch_output")).data == []
    assert (await client.files.delete(first.id)).deleted
    with pytest.raises(openai.NotFoundError):
        await client.files.content(first.id)
    keys = house.parts.storage.list("files")
    assert keys == sorted(f"files/acme/{file_id}" for file_id in (empty.id, third))


async def test_a_whole_number_of_answers_may_be_written_with_a_point(house: House) -> None:
    client = house.client()
    url = "/v1/completions"
    lines = [line("three", url, prompt=["Once", "upon"], n=3.0)]
    done = await until(client, (await create(client, lines, url)).id, "completed", "failed")
    (found,) = await read_lines(client, done.output_file_id)
    body = found["response"]["body"]
    assert len(body["choices"]) == 6
    assert body["usage"]["prompt_tokens"] == house.tokens("Once") + house.tokens("upon")


async def test_a_line_out_of_all_proportion_fails_its_batch(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve_apps.gateway.http.requests.MAX_VALUES", 50)
    monkeypatch.setattr("serve_apps.gateway.batches.work.MAX_LINE_BYTES", 1000)
    monkeypatch.setattr("serve_apps.gateway.batches.lines.MAX_LINE_BYTES", 1000)
    client = house.client()
    for wrong, part in [("[" + "1," * 60 + "1]", "61 values"), ("x" * 5000, "1000 bytes")]:
        failed = await until(client, (await create(client, [line("a"), wrong])).id, "failed")
        (error,) = failed.errors.data
        assert (error.code, error.line) == ("invalid_json_line", 2)
        assert part in error.message


async def test_a_batch_is_no_larger_than_is_allowed(settings: Settings) -> None:
    options = OPTIONS.model_copy(update={"max_requests": 3, "max_row_bytes": 3000})
    house = build(settings, ThreadRunner(settings), options=options)
    async with house.app.router.lifespan_context(house.app):
        client = house.client()
        for lines, part in [
            ([line(f"r{n}") for n in range(4)], "more than 3 requests"),
            ([line("a"), *[""] * 10], "more than 3 requests"),
            ([line("a", n=20)], "more than 3,000 bytes"),
        ]:
            failed = await until(client, (await create(client, lines)).id, "failed")
            (error,) = failed.errors.data
            assert error.code == "too_many_requests"
            assert part in error.message
        assert house.parts.storage.list("batches") == []


async def test_a_batch_that_cannot_be_worked_on_is_given_up(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> Any:
        raise TypeError("a fault of ours")

    client = house.client()
    monkeypatch.setattr("serve_apps.gateway.batches.work.answer_line", broken)
    failed = await until(client, (await create(client, [line("a")])).id, "failed", "completed")
    assert failed.status == "failed"
    assert failed.errors.data[0].code == "server_error"
    assert house.parts.storage.list("batches") == []


async def test_where_files_lie_is_not_the_clients_business(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise MachineError("no space left on the disk of /home/me/storage")

    client = house.client()
    small = await client.files.create(file=("a", b"x"), purpose="batch")
    monkeypatch.setattr(house.parts.storage, "write_chunks", full)
    with pytest.raises(openai.InternalServerError, match="cannot be kept") as caught:
        await client.files.create(file=("a", b"x"), purpose="batch")
    assert caught.value.status_code == 503
    assert "storage" not in str(caught.value)
    house.parts.storage.delete_file(f"files/acme/{small.id}")
    with pytest.raises(openai.NotFoundError, match="are gone") as gone:
        await client.files.content(small.id)
    assert "storage" not in str(gone.value)


async def test_another_tenant_finds_nothing(house: House) -> None:
    client, other = house.client(), house.client("other")
    batch = await create(client, [line("a")])
    done = await until(client, batch.id, "completed")
    assert (await other.files.list()).data == []
    assert (await other.batches.list()).data == []
    for file_id in (batch.input_file_id, done.output_file_id):
        for call in (other.files.retrieve, other.files.content, other.files.delete):
            with pytest.raises(openai.NotFoundError):
                await call(file_id)
    for call in (other.batches.retrieve, other.batches.cancel):
        with pytest.raises(openai.NotFoundError):
            await call(batch.id)
    with pytest.raises(openai.NotFoundError):
        await other.batches.create(
            input_file_id=batch.input_file_id, endpoint=CHAT, completion_window="24h"
        )
    reader = house.client(scope="models:read")
    for asking in (reader.files.list(), reader.batches.list()):
        with pytest.raises(openai.PermissionDeniedError):
            await asking
    for odd in ("..%2f..%2fheliostat.db", "file-%00", "../models"):
        with pytest.raises(openai.NotFoundError):
            await client.get(f"/files/{odd}/content", cast_to=httpx.Response)


async def test_a_form_that_is_none_is_refused_by_name(house: House) -> None:
    client = house.client()
    headers = {"authorization": f"Bearer {client.api_key}"}
    http = client._client

    file = ("a.jsonl", b"x")
    for values, status, part in [
        ({"json": {}}, 400, "not multipart/form-data"),
        ({"data": {"purpose": "batch"}, "files": {"other": file}}, 400, "'other' is not known"),
        ({"data": {"purpose": "fine-tune"}, "files": {"file": file}}, 400, "expected 'batch'"),
        ({"files": {"purpose": (None, "batch")}}, 400, "no field 'file'"),
        ({"data": {"purpose": "batch", "expires_after": "1"}, "files": {"file": file}}, 400,
         "'expires_after' is not known"),
        ({"data": {"purpose": "batch"}, "files": {"file": ("a", b"x" * 10_001)}}, 413,
         "more than 10000 bytes"),
        ({"data": {"purpose": "batch"}, "files": {"file": ("a", b"x" * 200_000)}}, 413,
         "the most allowed"),
        ({"content": b"--b\r\nnonsense", "headers": {"content-type":
         "multipart/form-data; boundary=b"}}, 400, "is no form"),
    ]:  # fmt: skip
        own = values.pop("headers", {})
        answer = await http.post("http://gateway/v1/files", headers=headers | own, **values)
        assert answer.status_code == status, values
        assert part in answer.json()["error"]["message"]
    assert house.parts.storage.list("files") == []


async def test_a_cancelled_batch_gives_what_was_answered(house: House) -> None:
    client = house.client()
    house.runner.is_paused = True
    batch = await create(client, [line(f"r{n}") for n in range(5)])
    await until(client, batch.id, "in_progress")
    (job_id, config) = house.runner.started[0]
    half = PredictConfig.model_validate(config)
    # As far as a job may get before it is stopped: two parts of three.
    await asyncio.to_thread(predict, half, house.settings)
    output = house.parts.storage
    for name in ("parts/00002.json", "rows/00002.jsonl", "errors.jsonl"):
        output.delete_file(f"batches/{batch.id}/output/{name}")
    assert (await client.batches.cancel(batch.id)).status == "cancelling"
    done = await until(client, batch.id, "cancelled")
    assert house.runner.state(job_id) == "failed"
    answered = await read_lines(client, done.output_file_id)
    assert [each["custom_id"] for each in answered] == ["r0", "r1", "r2", "r3"]
    (rest,) = await read_lines(client, done.error_file_id)
    assert (rest["custom_id"], rest["error"]["code"]) == ("r4", "batch_cancelled")
    house.runner.is_paused = False
    whole = await until(client, (await create(client, [line("a")])).id, "completed")
    with pytest.raises(openai.ConflictError):
        await client.batches.cancel(whole.id)


async def test_a_failed_job_is_tried_again_and_then_given_up(house: House) -> None:
    client = house.client()
    house.runner.failures = 2
    again = await until(client, (await create(client, [line("a")])).id, "completed", "failed")
    assert again.status == "completed"
    assert [job_id.rpartition("-")[2] for job_id, _ in house.runner.started] == ["0", "1", "2"]
    house.runner.failures = 3
    batch = await until(client, (await create(client, [line("a")])).id, "completed", "failed")
    assert batch.status == "failed"
    assert "the job batch_" in batch.errors.data[0].message


async def test_batches_wait_their_turn(house: House) -> None:
    client = house.client()
    house.runner.is_paused = True
    first = await create(client, [line("a")])
    await until(client, first.id, "in_progress")
    second = await create(client, [line("b")])
    await asyncio.sleep(0.2)
    assert (await client.batches.retrieve(second.id)).status == "validating"
    listed = [batch.id async for batch in client.batches.list(limit=1)]
    assert listed == [second.id, first.id]
    house.runner.is_paused = False
    await client.batches.cancel(first.id)
    await until(client, second.id, "completed")


async def test_a_batch_that_is_late_ends_with_what_there_is(settings: Settings) -> None:
    options = OPTIONS.model_copy(update={"completion_window_s": 1.0})
    house = build(settings, ThreadRunner(settings), options=options)
    house.runner.is_paused = True
    async with house.app.router.lifespan_context(house.app):
        client = house.client()
        late = await until(client, (await create(client, [line("a")])).id, "expired")
        (rest,) = await read_lines(client, late.error_file_id)
        assert rest["error"]["code"] == "batch_expired"
        assert late.expired_at >= late.expires_at


async def test_a_batch_spends_no_more_than_its_tenant_has(house: House) -> None:
    client, database = house.client("poor"), open_database(house.settings.database)
    prompt = house.tokens("Once")
    limit = 3 * (prompt + 4) + prompt + 3
    ApiKeys(database).set_tenant("poor", limits={"monthly_tokens": limit})
    url = "/v1/completions"
    lines = [
        line(f"r{n}", url, prompt="Once", structured_outputs={"regex": "[a-z]{40}"})
        for n in range(9)
    ]
    done = await until(client, (await create(client, lines, url)).id, "completed", "failed")
    assert (done.status, done.errors.data[0].code) == ("failed", "insufficient_quota")
    answers = await read_lines(client, done.output_file_id)
    assert [each["custom_id"] for each in answers] == ["r0", "r1", "r2"]
    errors = await read_lines(client, done.error_file_id)
    assert [each["custom_id"] for each in errors] == [f"r{n}" for n in range(3, 9)]
    assert {each["error"]["code"] for each in errors} == {"insufficient_quota"}
    assert "has no tokens left" in errors[0]["error"]["message"]
    (used,) = Ledger(database).totals(tenant="poor")
    assert used.prompt_tokens + used.completion_tokens == 3 * (prompt + 4)
    ApiKeys(database).set_tenant("poor", limits={"monthly_tokens": 10_000})
    again = await until(client, (await create(client, lines, url)).id, "completed", "failed")
    assert (again.status, again.request_counts.completed) == ("completed", 9)


async def test_a_batch_survives_its_gateway_and_has_one_job(settings: Settings) -> None:
    """Two replicas drive, one stops in the middle; then all are new, with a cluster that forgot."""
    runner = ThreadRunner(settings)
    runner.is_paused = True
    first, second = build(settings, runner), build(settings, runner)
    async with second.app.router.lifespan_context(second.app):
        async with first.app.router.lifespan_context(first.app):
            client = first.client()
            batches = [await create(client, [line("a"), line("b")])]
            await until(client, batches[0].id, "in_progress")
        batches.append(await create(second.client(), [line("c")]))
        await asyncio.sleep(0.2)
    assert len(runner.started) == 1
    forgotten = ThreadRunner(settings)
    third = build(settings, forgotten)
    async with third.app.router.lifespan_context(third.app):
        for batch in batches:
            done = await until(third.client(), batch.id, "completed")
            assert len(await read_lines(third.client(), done.output_file_id)) > 0
    assert [job_id for job_id, _ in forgotten.started] == [f"{b.id}-0" for b in batches]


def test_of_many_drivers_one_begins_a_batch(settings: Settings) -> None:
    started: list[str] = []

    class Counting(ThreadRunner):
        def start(self, job_id: str, config: Mapping[str, Any]) -> None:
            started.append(job_id)
            self._states[job_id] = "running"

    # Nobody's claim lasts: all drive the same batches.
    options = OPTIONS.model_copy(update={"lease_s": 0.001, "max_running": 100})
    house = build(settings, Counting(settings), options=options)
    for number in range(6):
        house.parts.store.add(
            Batch(
                id=f"batch_{number}",
                tenant="acme",
                api_key_id="key_1",
                endpoint=CHAT,
                model="talker",
                version="talker/1",
                input_file_id="file-1",
                moments={"created_at": 0, "expires_at": 2**40},
                counts={"total": 1, "completed": 0, "failed": 0, "refused": 0, "rows": 1},
            )
        )

    def drive() -> None:
        models = Models(RoutingTable(Routes), ModelCatalogue(house.load), InProcessBackend())
        driver = BatchDriver(house.parts, models, TextLimits())
        for _ in range(5):
            driver.step()

    threads = [threading.Thread(target=drive) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(started) == len(set(started)) == 6


async def test_a_batch_runs_as_a_process_of_its_own(settings: Settings) -> None:
    runner = ProcessRunner(
        settings,
        {
            "HELIOSTAT_MLFLOW_TRACKING_URI": settings.tracking_uri,
            "HELIOSTAT_RAY_PORT": "1",
            "PYTHONPATH": str(settings.source_dir),
        },
    )
    house = build(settings, runner)
    try:
        async with house.app.router.lifespan_context(house.app):
            client = house.client()
            done = await until(
                client, (await create(client, [line("a")])).id, "completed", "failed"
            )
            assert done.status == "completed"
            assert len(await read_lines(client, done.output_file_id)) == 1
    finally:
        runner.close()
