"""A whole gateway in one process: real keys, tokenizer and processing; fake engine and graph."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import shutil
import sqlite3
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import httpx
import numpy as np
import pytest
import uvicorn
from sqlalchemy.engine import Engine
from starlette.applications import Starlette
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from cluster.database import open_database
from cluster.drift_counts import DriftStore
from cluster.errors import ChangedFileError, NotFoundError, UpstreamFailedError
from cluster.grammars import Grammars
from cluster.ledger import Ledger
from cluster.model_package.manifest import Golden, LanguageModelInfo, Manifest
from cluster.processing import Datatype, ImageInput, Labels, Processing, Softmax, TensorSpec
from cluster.processing.text import TextProcessor
from cluster.releases import ReleaseStore
from cluster.security.api_keys import ApiKeys
from cluster.security.audit import AuditLog
from cluster.security.leases import LeaseStore
from cluster.statistics.features import input_features
from cluster.statistics.profile import DISTRIBUTIONS, DataProfile, describe
from serve_apps.gateway.asgi import GatewayConfig, GatewayParts, build_asgi
from serve_apps.gateway.backend import Arrays, InProcessBackend
from serve_apps.gateway.catalogue import ServedModel
from serve_apps.gateway.drift import DriftWatch
from serve_apps.gateway.open_inference.grpc_server import GrpcAddress
from serve_apps.gateway.routing_table import Routes, ServedVersion
from serve_apps.gateway.telemetry.telemetry import Telemetry
from serve_apps.llm.engine import EngineRequest, TokenOutput
from serve_apps.llm.fake import FakeEngine
from serve_apps.options import DeploymentOptions

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
EOS = "<|end|>"
CONTEXT_TOKENS = 256
DIGEST = "sha256:" + "0" * 64


def save_tokenizer(directory: Path, template: str | None = CHAT_TEMPLATE) -> Tokenizer:
    """A byte-level BPE with a chat template, as a Hugging Face directory has it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[EOS, "<|user|>", "<|assistant|>", "<|system|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(["the heliostat follows the sun", "定日镜跟随太阳"] * 5, trainer)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS}))
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    return tokenizer


def text_manifest(vocab_size: int, *, has_chat_template: bool = True) -> Manifest:
    return Manifest(
        kind="language_model",
        name="talker",
        created_at="2026-01-01T00:00:00+00:00",
        files={},
        language_model=LanguageModelInfo(
            architecture="FakeForCausalLM",
            max_context_tokens=CONTEXT_TOKENS,
            vocab_size=vocab_size,
            num_parameters=1,
            eos_token_ids=(0,),
            has_chat_template=has_chat_template,
        ),
        golden=Golden(inputs={}, outputs={}),
    )


def graph_manifest() -> Manifest:
    """Four pixels in, three classes out, from numbers or from a 2 × 2 PNG."""
    return Manifest(
        kind="graph",
        name="classes",
        created_at="2026-01-01T00:00:00+00:00",
        files={},
        inputs=(TensorSpec(name="pixels", datatype="FP32", shape=(-1, 4)),),
        outputs=(TensorSpec(name="logits", datatype="FP32", shape=(-1, 3)),),
        processing=Processing(
            raw_inputs={"image": ImageInput(target="pixels", width=2, height=2, scale=1 / 255)},
            post=(
                Softmax(tensor="logits", into="probabilities"),
                Labels(tensor="logits", into="label", labels=("dark", "mixed", "bright")),
            ),
        ),
        profile={DISTRIBUTIONS: graph_profile().model_dump(mode="json")},
        golden=Golden(inputs={}, outputs={}),
    )


def graph_profile() -> DataProfile:
    """Pixels from 0 to 1, of which as many are dark as bright."""
    pixels = np.random.default_rng(0).random((500, 4), dtype=np.float32)
    labels = np.array(["dark", "bright"] * 250, dtype=object)
    return DataProfile(
        inputs=describe(input_features({"pixels": pixels})), outputs=describe({"label": labels})
    )


def echo_manifest() -> Manifest:
    """One column of each datatype in, the same out."""
    specs = [
        TensorSpec(name=datatype.lower(), datatype=datatype, shape=(-1, 1))
        for datatype in get_args(Datatype)
    ]
    return Manifest(
        kind="graph",
        name="echo",
        created_at="2026-01-01T00:00:00+00:00",
        files={},
        inputs=tuple(specs),
        outputs=tuple(spec.model_copy(update={"name": f"same_{spec.name}"}) for spec in specs),
        golden=Golden(inputs={}, outputs={}),
    )


def echo(arrays: Arrays) -> Arrays:
    return {f"same_{name}": array for name, array in arrays.items()}


def classify(arrays: Arrays) -> Arrays:
    """Logits that favour a class by mean brightness."""
    mean = arrays["pixels"].mean(axis=1, keepdims=True)
    centres = np.array([[0.0, 0.5, 1.0]], dtype=np.float32)
    return {"logits": (-20 * (mean - centres) ** 2).astype(np.float32)}


class FakeControl:
    """A release controller that remembers what it was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.error: Exception | None = None

    async def deploy(
        self, ref: str, strategy: str, options: dict[str, Any], actor: str
    ) -> dict[str, Any]:
        self.calls.append(("deploy", ref, strategy, options, actor))
        if self.error is not None:
            raise self.error
        return {"name": ref, "version": 1, "state": "deploying", "reason": "asked"}

    async def undeploy(
        self, name: str, version: int | None, notice_s: int | None, actor: str
    ) -> list[dict[str, Any]]:
        self.calls.append(("undeploy", name, version, notice_s, actor))
        return [{"name": name, "version": version or 1, "state": "retiring"}]

    async def steer(self, name: str, verb: str, actor: str) -> dict[str, Any]:
        self.calls.append((verb, name, actor))
        state = {"promote": "champion", "rollback": "champion"}.get(verb, "canary")
        return {"name": name, "version": 1, "state": state, "reason": f"asked to {verb}"}

    async def deployments(self, name: str | None) -> list[dict[str, Any]]:
        rows = [{"name": "classes", "version": 1, "state": "champion"}]
        return [row for row in rows if name in (None, row["name"])]

    async def release(self, name: str) -> dict[str, Any]:
        if name != "classes":
            raise NotFoundError(f"model '{name}' is not deployed")
        line = {"stage": "canary 5%", "metric": "label_disagreement", "arm": "pair"}
        event = {"at": "2030", "version": 1, "state": "canary 5%", "actor": "controller"}
        return {
            "name": name,
            "weights": {"1": 1.0},
            "deployments": [],
            "history": [],
            "evidence": [{**line, "num": 412, "mean": 0.01}],
            "timeline": [{**event, "reason": "no worse in 412 requests"}],
        }


@dataclass
class Gateway:
    """The application under test with what tests reach for."""

    app: Starlette
    client: httpx.AsyncClient
    backend: InProcessBackend
    engine: FakeEngine
    control: FakeControl
    keys: ApiKeys
    database_url: str
    served: dict[tuple[str, int], ServedVersion]
    loaded: list[str]
    """Names whose packages were opened."""
    graphs: dict[str, ServedModel]
    telemetry: Telemetry
    database: Engine
    routes: Routes
    """What the gateway reads now and then; replaced by `route`."""
    drift: DriftWatch

    async def route(self, **changes: Any) -> None:
        """Other routes, which the gateway has taken when this returns."""
        self.routes = dataclasses.replace(self.routes, **changes)
        table = self.app.state.models._table
        while table.current != self.routes:
            table._read_at = 0.0
            await table.refresh()

    def serve_graph(
        self, manifest: Manifest, predict: Callable[[Arrays], Arrays], text: Any = None
    ) -> None:
        """One more model, under the manifest's name."""
        name = manifest.name
        options = DeploymentOptions(max_batch_size=4)
        served = ServedVersion(name, 1, DIGEST, f"{name}.v1", options=options)
        self.graphs[name] = ServedModel(served, manifest, text)
        self.backend._predictors[served.application] = predict
        self.served[name, 1] = served

    def break_next_stream(self, num_tokens: int) -> None:
        """The replica of the next stream dies once it gave so many tokens."""
        generate = self.backend.generate

        async def breaking(
            application: str, request: EngineRequest, *, drain_s: float
        ) -> AsyncGenerator[TokenOutput, None]:
            self.backend.generate = generate  # type: ignore[method-assign]
            num_given = 0
            outputs = generate(application, request, drain_s=drain_s)
            try:
                async for output in outputs:
                    num_given += len(output.token_ids)
                    if num_given > num_tokens:
                        raise UpstreamFailedError("the replica died")
                    yield output
            finally:
                await outputs.aclose()

        self.backend.generate = breaking  # type: ignore[method-assign]

    def headers(self, *scopes: str) -> dict[str, str]:
        key = self.keys.create("acme", scopes or ["infer", "models:read", "admin"]).key
        return {"authorization": f"Bearer {key}"}


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizers of talker (with a chat template) and mute (without)."""
    directory = tmp_path_factory.mktemp("models")
    save_tokenizer(directory / "talker")
    save_tokenizer(directory / "mute", template=None)
    return directory


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated SQLite file to copy: migrating takes longer than most tests."""
    path = tmp_path_factory.mktemp("database") / "empty.db"
    open_database(f"sqlite:///{path}").dispose()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return path


@pytest.fixture
async def gateway(tmp_path: Path, models_dir: Path, empty_database: Path) -> AsyncIterator[Gateway]:
    """talker/1 (chat), mute/1 (no template, few places), classes/1 and 2, broken/1, and echo/1,
    which is reached by its version only."""
    vocab_size = TextProcessor.load(models_dir / "talker").vocab_size
    roomy = DeploymentOptions(max_queued_requests=8, request_timeout_s=5)
    narrow = DeploymentOptions(max_ongoing_requests=2, max_queued_requests=1)
    served = {
        (name, version): ServedVersion(
            name, version, DIGEST, f"{name}.v{version}", options=narrow if name == "mute" else roomy
        )
        for name, version in [
            ("talker", 1), ("mute", 1), ("classes", 1), ("classes", 2), ("broken", 1), ("echo", 1),
        ]
    }  # fmt: skip
    routes = Routes(
        served=served,
        weights={
            "talker": {1: 1.0},
            "mute": {1: 1.0},
            "classes": {2: 1.0},
            "broken": {1: 1.0},
            "retired": {},
        },
        aliases={("classes", "champion"): 2, ("classes", "previous"): 1, ("classes", "next"): 3},
    )

    loaded: list[str] = []
    graphs: dict[str, ServedModel] = {}
    parts: list[Gateway] = []

    def load(version: ServedVersion) -> ServedModel:
        loaded.append(version.name)
        if version.name in graphs:
            return dataclasses.replace(graphs[version.name], served=version)
        if version.name == "broken":
            raise ChangedFileError("model/model.onnx is not what was signed")
        if version.name == "echo":
            return ServedModel(version, echo_manifest())
        if version.name == "classes":
            return ServedModel(version, graph_manifest())
        manifest = text_manifest(vocab_size, has_chat_template=version.name == "talker")
        return ServedModel(version, manifest, TextProcessor.load(models_dir / version.name))

    database_url = f"sqlite:///{tmp_path / 'gateway.db'}"
    shutil.copy(empty_database, tmp_path / "gateway.db")
    database = open_database(database_url)
    keys, audit, control = ApiKeys(database), AuditLog(database), FakeControl()
    engine = FakeEngine(
        vocab_size=vocab_size,
        max_context_tokens=CONTEXT_TOKENS,
        step_time_s=0.0005,
        grammars=Grammars.load(models_dir / "talker", vocab_size=vocab_size, eos_token_ids=(0,)),
    )
    backend = InProcessBackend(
        predictors={"classes.v1": classify, "classes.v2": classify, "echo.v1": echo},
        engines={
            "talker.v1": engine,
            "mute.v1": FakeEngine(vocab_size=vocab_size, step_time_s=0.2),
        },
    )
    telemetry = Telemetry(logs_access=True)
    drift = DriftWatch(telemetry.instruments, DriftStore(database).write)
    app = build_asgi(
        GatewayParts(
            verify=keys.verify,
            read_routes=lambda: parts[0].routes if parts else routes,
            load_model=load,
            backend=backend,
            control=control,
            audit=audit.record,
            exchange=LeaseStore(database).exchange,
            totals=Ledger(database).totals,
            add_evidence=ReleaseStore(database).add_evidence,
            config=GatewayConfig(max_body_bytes=64 * 1024),
            telemetry=telemetry,
            grpc_address=GrpcAddress("127.0.0.1", 0),
            drift=drift,
        )
    )
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://gateway", timeout=30
        ) as client,
    ):
        whole = Gateway(
            app,
            client,
            backend,
            engine,
            control,
            keys,
            database_url,
            served,
            loaded,
            graphs,
            telemetry,
            database,
            routes,
            drift,
        )
        parts.append(whole)
        while not (await client.get("/v2/health/ready")).is_success:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        yield whole
    backend.close()
    database.dispose()
    open_database.cache_clear()


@pytest.fixture
async def server_url(gateway: Gateway) -> AsyncIterator[str]:
    """The same application behind a real HTTP server."""
    config = uvicorn.Config(gateway.app, port=0, log_level="warning", lifespan="off")
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    await serving
