"""A replica answers the golden prompts before any other, an adapter together with its base."""

from __future__ import annotations

import asyncio
import dataclasses
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import InputError, MissingToolError, NotFoundError, PackageError, ParityError
from cluster.generation import Grammar
from cluster.model_package import LocalSigner, ensure_local_key, open_digest, write_package
from cluster.processing.text import TextProcessor
from cluster.settings import Settings
from cluster.storage import Storage
from serve_apps.llm import deployment
from serve_apps.llm.channels import Channel, Part
from serve_apps.llm.continuous_batching import ContinuousBatchingEngine
from serve_apps.llm.deployment import LanguageModel
from serve_apps.llm.engine import EngineRequest, Sampling
from serve_apps.llm.fake import FakeEngine
from serve_apps.llm.native.engine import NativeEngine
from tests.tiny_models import save_adapter, save_llama


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    settings = Settings(home=tmp_path / "home")
    monkeypatch.setenv("HELIOSTAT_HOME", str(settings.home))
    ensure_local_key(settings.keys_dir)
    return settings


def publish(model_dir: Path, settings: Settings) -> str:
    return write_package(
        model_dir,
        name="model",
        kind="language_model",
        storage=Storage.open(settings.storage_root),
        signer=LocalSigner(settings.keys_dir),
    ).digest


@pytest.mark.parametrize(
    ("options", "engine", "precision"),
    [
        ({}, NativeEngine, "float32"),
        ({"dtype": "bfloat16"}, NativeEngine, "bfloat16"),
        ({"engine": "native", "weights": "int8"}, NativeEngine, "int8"),
        ({"engine": "transformers"}, ContinuousBatchingEngine, "float32"),
    ],
)
def test_the_native_engine_serves_what_it_can_read(
    language_model_dir: Path,
    settings: Settings,
    options: dict[str, Any],
    engine: type,
    precision: str,
) -> None:
    replica = LanguageModel(publish(language_model_dir, settings), options)
    assert isinstance(replica._runner._engine, engine)
    assert replica._runner.stats().precision == precision
    replica._runner.close()


def test_a_replica_that_computes_something_else_takes_no_traffic(
    language_model_dir: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = publish(language_model_dir, settings)
    with monkeypatch.context() as patch:
        patch.setattr(deployment, "_build_engine", lambda *_: FakeEngine(vocab_size=257))
        with pytest.raises(ParityError, match=r"prompt 0, token 0 is \d+, expected \d+"):
            LanguageModel(digest, {})
    monkeypatch.setattr(TextProcessor, "encode", lambda *_: [1, 2, 3])
    with pytest.raises(ParityError, match=r"token ids of text 0 differs at 0: \[1, 2, 3\], exp"):
        LanguageModel(digest, {})


def test_what_the_native_engine_cannot_read_is_served_by_transformers(
    tmp_path: Path, settings: Settings
) -> None:
    directory = save_llama(tmp_path / "olmo", "some text", architecture="Olmo2")
    digest = publish(directory, settings)
    replica = LanguageModel(digest, {})
    assert isinstance(replica._runner._engine, ContinuousBatchingEngine)
    replica._runner.close()
    with pytest.raises(PackageError, match="the native engine cannot run this model: models of"):
        LanguageModel(digest, {"engine": "native"})


def test_an_adapter_is_served_merged_into_its_base(
    language_model_dir: Path, tmp_path: Path, settings: Settings
) -> None:
    storage = Storage.open(settings.storage_root)
    signer = LocalSigner(settings.keys_dir)
    base = write_package(
        language_model_dir, name="base", kind="language_model", storage=storage, signer=signer
    )
    adapter = write_package(
        save_adapter(tmp_path / "adapter", language_model_dir),
        name="adapter",
        kind="adapter",
        storage=storage,
        signer=signer,
        base=open_digest(base.digest, settings),
    )
    assert adapter.manifest.golden.outputs != base.manifest.golden.outputs
    # Starting it replays the adapter's golden prompts.
    for engine in ("native", "transformers"):
        LanguageModel(adapter.digest, {"engine": engine})._runner.close()
    storage.delete_dir(f"packages/{base.digest.removeprefix('sha256:')}")
    for entry in settings.package_cache_dir.glob(base.digest.removeprefix("sha256:")):
        entry.rename(tmp_path / "gone")
    with pytest.raises(NotFoundError, match=f"the base of adapter {adapter.digest} is not there"):
        LanguageModel(adapter.digest, {})


@pytest.mark.parametrize(
    ("options", "precision"), [({}, "bfloat16"), ({"dtype": "float32"}, "float32")]
)
def test_a_merged_adapter_is_computed_as_its_base_is(
    tmp_path: Path, settings: Settings, options: dict[str, str], precision: str
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    base_dir = save_llama(tmp_path / "base", "some text")
    halved = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.bfloat16)
    halved.save_pretrained(base_dir)
    base = open_digest(publish(base_dir, settings), settings)
    adapter = write_package(
        save_adapter(tmp_path / "adapter", base_dir),
        name="adapter",
        kind="adapter",
        storage=Storage.open(settings.storage_root),
        signer=LocalSigner(settings.keys_dir),
        base=base,
    )
    for digest in (base.digest, adapter.digest):
        replica = LanguageModel(digest, options)
        assert replica._runner.stats().precision == precision
        replica._runner.close()


@dataclass
class Family:
    """A base with adapters, and one of another base."""

    base: str
    adapters: tuple[str, str]
    others: tuple[str, str]
    """One more adapter, and one of another base."""
    settings: Settings


@pytest.fixture
def family(tmp_path: Path, settings: Settings) -> Family:
    storage, signer = Storage.open(settings.storage_root), LocalSigner(settings.keys_dir)
    base, other = (
        publish(save_llama(tmp_path / name, f"{name} text", tie_word_embeddings=False), settings)
        for name in ("base", "other")
    )

    def adapter(name: str, base: str, base_dir: Path, seed: int) -> str:
        directory = save_adapter(tmp_path / name, base_dir, seed=seed)
        return write_package(
            directory,
            name=name,
            kind="adapter",
            storage=storage,
            signer=signer,
            base=open_digest(base, settings),
        ).digest

    first, second, third = (adapter(f"a{n}", base, tmp_path / "base", n) for n in (1, 2, 3))
    stranger = adapter("stranger", other, tmp_path / "other", 3)
    return Family(base, (first, second), (third, stranger), settings)


async def answer(replica: LanguageModel, adapter: str | None, request_id: str = "r") -> list[int]:
    sampling = Sampling(max_tokens=12, temperature=0)
    request = EngineRequest(request_id, (5, 6, 7), sampling, adapter=adapter)
    outputs = [output async for _, output in replica.generate(request)]
    return [token for output in outputs for token in output.token_ids]


async def test_a_base_answers_for_adapters_that_it_loads_when_asked(family: Family) -> None:
    merged = [LanguageModel(digest, {}) for digest in family.adapters]
    base = LanguageModel(family.base, {"max_adapters": 1})
    try:
        assert (await base.load_adapter(family.adapters[0])).digest == family.base
        plain = await answer(base, None)
        found = [await answer(base, digest) for digest in family.adapters]
        assert found == [await answer(replica, None) for replica in merged]
        # The first had to make room for the second, and is loaded again.
        assert await answer(base, family.adapters[0]) == found[0]
        assert len({tuple(each) for each in (plain, *found)}) == 3
        assert await answer(base, None) == plain
    finally:
        for replica in (base, *merged):
            replica._runner.close()


async def test_adapters_are_verified_before_they_answer(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = LanguageModel(family.base, {})
    no_shelf = LanguageModel(family.base, {"engine": "transformers"})
    first, second = family.adapters
    try:
        with pytest.raises(InputError, match="is no adapter of"):
            await answer(base, family.others[1])
        with pytest.raises(InputError, match="is no adapter of"):
            await answer(base, family.base)
        with pytest.raises(NotFoundError):
            await answer(base, "sha256:" + "0" * 64)
        key = first.removeprefix("sha256:")
        for root in (family.settings.package_cache_dir, Path(family.settings.storage_root)):
            for path in root.rglob(f"{key}/model/adapter_model.safetensors"):
                path.chmod(0o644)
                path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
        with pytest.raises(PackageError, match="adapter_model"):
            await answer(base, first)
        # A parser or kernel that is wrong here must not answer: it gives another adapter's outputs.
        load = base._runner._engine.load_adapter  # type: ignore[attr-defined]
        with monkeypatch.context() as patch:
            wrong_dir = open_digest(family.others[0], family.settings).model_dir
            patch.setattr(
                base._runner._engine, "load_adapter", lambda digest, _: load(digest, wrong_dir)
            )
            with pytest.raises(ParityError):
                await answer(base, second)
        assert len(await answer(base, second)) == 12
        for ask in (answer(no_shelf, second), no_shelf.load_adapter(second)):
            with pytest.raises(NotFoundError, match="is not loaded beside this model"):
                await ask
        assert len(await answer(base, None)) == 12
    finally:
        for replica in (base, no_shelf):
            replica._runner.close()


async def test_several_answers_of_one_reader_come_in_one_channel(
    language_model_dir: Path, settings: Settings
) -> None:
    replica = LanguageModel(publish(language_model_dir, settings), {})
    ids, sampling = "abcdef", Sampling(max_tokens=40, temperature=0, logit_bias=((0, -100),))
    own: dict[str, list[Part]] = {}
    shared: list[list[Part]] = []

    async def ask(request_id: str, reader: str = "me") -> None:
        request = EngineRequest(request_id, (5, 6, 7), sampling)
        own[request_id] = [part async for part in replica.generate(request, reader)]

    async def listen() -> None:
        async for parts in replica.listen(Channel("c", "me", "this")):
            shared.append(parts)

    try:
        await ask("alone")
        listening = asyncio.create_task(listen())
        await asyncio.gather(ask("other", "somebody else"), *(ask(each) for each in ids))
        await listening
        await ask("late")
    finally:
        replica._runner.close()
    expected = tokens_of(own["alone"])
    assert len(expected) == 40
    assert expected == tokens_of(own["late"]) == tokens_of(own["other"])
    for request_id in ids:
        assert own[request_id][-1][1].finish_reason == "length"
        parts = [part for parts in shared for part in parts if part[1].request_id == request_id]
        assert tokens_of([*own[request_id], *parts]) == expected
    assert len(shared) < 2 * 40 < sum(map(len, shared))


def tokens_of(parts: list[Part]) -> list[int]:
    """In order, none missing."""
    tokens: list[int] = []
    for start, output in sorted(parts, key=lambda part: part[0]):
        assert start == len(tokens)
        tokens.extend(output.token_ids)
    return tokens


@pytest.mark.parametrize("engine", ["native", "transformers"])
async def test_a_replica_holds_answers_to_a_grammar(
    language_model_dir: Path, settings: Settings, engine: str
) -> None:
    replica = LanguageModel(publish(language_model_dir, settings), {"engine": engine})
    text = TextProcessor.load(language_model_dir)
    info = open_digest(replica._description.digest, settings).manifest.language_model
    assert info is not None

    async def ask(pattern: str) -> str:
        sampling = Sampling(
            max_tokens=32, eos_token_ids=info.eos_token_ids, grammar=Grammar("regex", pattern)
        )
        outputs = replica.generate(EngineRequest("r", (5, 6, 7), sampling))
        return text.decode([token async for _, output in outputs for token in output.token_ids])

    try:
        assert re.fullmatch("(sun|moon){2}", await ask("(sun|moon){2}"))
        for wrong in ("(", "(((a{1000}){1000}){1000})"):
            with pytest.raises(InputError, match="regular expression is refused"):
                await ask(wrong)
    finally:
        replica._runner.close()


async def test_an_engine_that_holds_to_grammars_itself_gets_them_as_they_are(
    language_model_dir: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest, asked = publish(language_model_dir, settings), list[EngineRequest]()
    grammar = Grammar("regex", "(")  # which ours would refuse

    class Theirs(FakeEngine):
        def add(self, request: EngineRequest) -> None:
            asked.append(request)
            free = dataclasses.replace(request.sampling, grammar=None)
            super().add(dataclasses.replace(request, sampling=free))

    monkeypatch.setattr(deployment, "_build_vllm", lambda *_: Theirs(vocab_size=257))
    monkeypatch.setattr(deployment, "check_answers", lambda *_, **__: None)
    replica = LanguageModel(digest, {"engine": "vllm"})
    try:
        sampling = Sampling(max_tokens=4, temperature=0, grammar=grammar)
        request = EngineRequest("r", (5, 6, 7), sampling)
        outputs = [output async for _, output in replica.generate(request)]
        assert sum(len(output.token_ids) for output in outputs) == 4
        assert asked[-1].sampling.grammar == grammar
    finally:
        replica._runner.close()


def test_an_engine_that_is_not_installed_is_named(
    language_model_dir: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = publish(language_model_dir, settings)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingToolError, match=r"'vllm' is not installed .* engine: auto"):
        LanguageModel(digest, {"engine": "vllm"})
