"""Before and after training from a base: what is refused, what is recorded, what is packaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import HeliostatError, InputError
from cluster.model_package import (
    LocalSigner,
    ensure_local_key,
    golden,
    open_base,
    open_version,
    write_package,
)
from cluster.model_ref import ModelRef
from cluster.registry import ModelRegistry
from cluster.settings import Settings
from cluster.storage import Storage
from jobs.data.dataset import Dataset
from jobs.export import export
from jobs.exporting.config import ExportConfig
from jobs.prepare import open_catalog
from jobs.train import check, check_family
from jobs.training.config import TrainConfig
from jobs.training.parallelism import Layout
from jobs.training.publishing import publish
from jobs.training.starting_point import Start, find_start
from jobs.training.worker import Outcome, WorkerJob, run_worker
from tests.tiny_models import CHAT_TEMPLATE, save_llama
from tests.unit.jobs.training.conftest import MakeConfig

Make = Callable[..., TrainConfig]


@pytest.fixture(scope="module")
def chat_base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_llama(tmp_path_factory.mktemp("base"), "text")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return directory


@pytest.fixture
def settings(tmp_path: Path, chat_base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """A home with the base registered as `helper-base/1`; MLflow, which numbers versions, is not
    needed."""
    monkeypatch.setattr("cluster.registry.open_client", lambda settings: None)
    monkeypatch.setattr("cluster.publishing.require_server", lambda settings: None)
    monkeypatch.setattr(
        "cluster.registry.number_version",
        lambda *_, taken, **others: max(taken, default=0) + 1,
    )
    settings = Settings(home=tmp_path / "home")
    ensure_local_key(settings.keys_dir)
    published = write_package(
        chat_base_dir,
        name="helper-base",
        kind="language_model",
        storage=Storage.open(settings.storage_root),
        signer=LocalSigner(settings.keys_dir),
    )
    registry = ModelRegistry.open(settings)
    registry.register("helper-base", published)
    registry.set_alias("helper-base", "candidate", 1, actor="test", reason="why")
    return settings


@pytest.fixture
def make(make_config: MakeConfig, tmp_path: Path) -> Make:
    with (tmp_path / "chat.jsonl").open("w", encoding="utf-8") as file:
        for number in range(40):
            turns = [("user", f"say {number}"), ("assistant", f"{number}!")]
            messages = [{"role": role, "content": content} for role, content in turns]
            file.write(json.dumps({"messages": messages}) + "\n")

    def config(base: str, *, tokenizer: str = "", **values: Any) -> TrainConfig:
        existing = {"kind": "existing", "path": tokenizer or base}
        data = {
            "name": "chat",
            "source": {"kind": "chat", "paths": [str(tmp_path / "chat.jsonl")]},
            "text": {"tokenizer": existing, "sequence_length": 48},
        }
        model = {"family": "causal_lm", "base": base, **values.pop("model", {})}
        made = {"data": data, "model": model, "steps": 2, "batch_size": 4, "name": "helper"}
        return make_config(**{**made, **values})

    return config


def prepared(start: Start, settings: Settings) -> Dataset:
    return open_catalog(settings).ensure(start.local.data)[0]


def trained(start: Start, settings: Settings, run_dir: Path) -> tuple[Outcome, Dataset]:
    dataset = prepared(start, settings)
    check_family(start, dataset)
    return run_worker(WorkerJob(start.local, dataset.directory, run_dir), print), dataset


def published(start: Start, settings: Settings, run_dir: Path) -> Any:
    outcome, dataset = trained(start, settings, run_dir)
    return publish(
        outcome,
        start.config,
        dataset,
        settings,
        run_id="run",
        job_id="",
        git_commit="commit",
        base=start.base,
    )


def test_an_alias_is_recorded_as_the_version_it_means(make: Make, settings: Settings) -> None:
    start = find_start(make("helper-base@candidate"), settings)
    assert start.base is not None
    model, local = start.config.model, start.local.model
    assert (model.base, model.base_digest) == ("helper-base/1", start.base.digest)  # type: ignore[union-attr]
    assert start.config.data.text.tokenizer.path == "helper-base/1"  # type: ignore[union-attr]
    assert local.base == str(start.base.directory)  # type: ignore[union-attr]
    assert find_start(start.config, settings).config == start.config
    assert start.config.identity != make("helper-base@candidate").identity


def test_a_base_that_is_not_the_one_expected_is_refused(make: Make, settings: Settings) -> None:
    model = {"base_digest": "sha256:" + "0" * 64}
    with pytest.raises(HeliostatError, match=r"'helper-base/1' has digest .* expected sha256:000"):
        find_start(make("helper-base/1", model=model), settings)


def test_a_tokenizer_of_its_own_is_asked_for(make_config: MakeConfig, settings: Settings) -> None:
    config = make_config(
        data={"name": "topics", "source": {"kind": "python_topics"}},
        model={"family": "causal_lm", "base": "helper-base/1"},
    )
    with pytest.raises(InputError, match="has a tokenizer of its own") as caught:
        find_start(config, settings)
    assert caught.value.hint == ("set data.text.tokenizer to {kind: existing, path: helper-base/1}")


def test_another_models_tokenizer_is_refused(
    make: Make, settings: Settings, chat_base_dir: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(chat_base_dir, tmp_path / "other"))
    content = json.loads((other / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    start = find_start(make("helper-base/1", tokenizer=str(other)), settings)
    with pytest.raises(InputError, match=r"another tokenizer than that of model\.base") as caught:
        check_family(start, prepared(start, settings))
    assert "path: helper-base/1" in str(caught.value.hint)


def test_a_base_whose_tokenizer_is_no_json_is_one_line(
    make: Make, settings: Settings, chat_base_dir: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(chat_base_dir, tmp_path / "other"))
    (other / "tokenizer.json").write_text("[" * 200_000)
    start = find_start(make(str(other), tokenizer=str(chat_base_dir)), settings)
    with pytest.raises(
        InputError, match=r"other/tokenizer\.json' is no tokenizer: it holds no JSON"
    ):
        check_family(start, prepared(start, settings))


def test_an_adapter_of_an_unregistered_base_must_be_merged(
    make: Make, settings: Settings, chat_base_dir: Path
) -> None:
    with pytest.raises(InputError, match="names the package of its base") as caught:
        find_start(make(str(chat_base_dir), model={"lora": {}}), settings)
    assert "models import" in str(caught.value.hint)
    assert "model.lora.merge" in str(caught.value.hint)
    find_start(make(str(chat_base_dir), model={"lora": {"merge": True}}), settings)


@pytest.mark.parametrize("kind", ["tensor", "pipeline"])
def test_a_base_is_not_divided_among_workers(make: Make, kind: str) -> None:
    config = make("helper-base/1", parallelism={kind: 2})
    with pytest.raises(HeliostatError, match=f"model.base cannot be divided .* parallelism.{kind}"):
        Layout.of(config, 2)


def test_a_check_counts_the_bases_parameters(
    make: Make, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    check(make("helper-base@candidate", launcher="local"), settings)
    assert "26,816" in capsys.readouterr().out


def test_an_adapter_is_published_with_its_base_and_merged_on_request(
    make: Make, settings: Settings, tmp_path: Path
) -> None:
    config = make("helper-base@candidate", model={"lora": {"rank": 2}})
    start = find_start(config, settings)
    assert start.base is not None
    version = published(start, settings, tmp_path / "run")
    assert (version.kind, version.parent_digest) == ("adapter", start.base.digest)
    package = open_version(version, settings)
    base = open_base(package, settings)
    assert base.digest == start.base.digest
    golden.replay(package, base)
    assert package.manifest.language_model is not None
    assert package.manifest.language_model.has_chat_template
    registry = ModelRegistry.open(settings)
    export(ExportConfig(model="helper/1", name="helper-merged", to="merged"), settings)
    merged = registry.resolve(ModelRef("helper-merged", alias="candidate"))
    assert (merged.kind, merged.parent_digest) == ("language_model", version.digest)
    whole = open_version(merged, settings)
    golden.replay(whole)
    parity = whole.manifest.parity
    assert parity["largest_difference"] <= parity["tolerance"]  # type: ignore[operator]
    assert whole.manifest.golden.inputs == package.manifest.golden.inputs
    assert (
        whole.manifest.golden.outputs["completions"]
        == (package.manifest.golden.outputs["completions"])
    )
    with pytest.raises(InputError, match="to=merged expects adapter"):
        export(ExportConfig(model="helper-merged/1", name="again", to="merged"), settings)
    with pytest.raises(InputError, match=r"helper/1 is of kind 'adapter'.*merged model"):
        find_start(make("helper/1"), settings)


def test_a_merged_adapter_is_a_plain_language_model(
    make: Make, settings: Settings, tmp_path: Path
) -> None:
    config = make("helper-base@candidate", model={"lora": {"rank": 2, "merge": True}})
    start = find_start(config, settings)
    assert start.base is not None
    version = published(start, settings, tmp_path / "run")
    assert (version.kind, version.parent_digest) == ("language_model", start.base.digest)
    package = open_version(version, settings)
    assert package.manifest.adapter is None
    assert package.manifest.parity["largest_difference"] < 1e-3  # type: ignore[operator]
    names = {name.removeprefix("model/") for name in package.manifest.files}
    assert {"config.json", "model.safetensors", "chat_template.jinja"} <= names
    assert "adapter_config.json" not in names
    golden.replay(package)
