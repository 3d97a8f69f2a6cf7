"""An adapter is packaged, verified and merged with its base, and refused without it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from cluster.errors import ForbiddenFileError, MissingFileError, PackageError, ParityError
from cluster.model_package import (
    LocalSigner,
    Manifest,
    ModelPackage,
    PublishedPackage,
    TrustStore,
    golden,
    open_package,
    write_package,
)
from cluster.model_package import adapter as module
from cluster.model_package.adapter import load_adapted, load_merged, merge_into
from cluster.storage import Storage
from tests.tiny_models import save_adapter

Publish = Callable[..., ModelPackage]


@pytest.fixture(scope="session")
def kept_adapter_dir(language_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tmp_path_factory.mktemp("adapter"), language_model_dir)


@pytest.fixture
def adapter_dir(kept_adapter_dir: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(kept_adapter_dir, tmp_path / "adapter"))


@pytest.fixture
def publish_text(storage: Storage, keys_dir: Path, trust: TrustStore, cache_dir: Path) -> Publish:
    def publish(directory: Path, base: ModelPackage | None = None) -> ModelPackage:
        published: PublishedPackage = write_package(
            directory,
            name="m",
            kind="adapter" if (directory / "adapter_config.json").exists() else "language_model",
            storage=storage,
            signer=LocalSigner(keys_dir),
            golden_inputs=["once"],
            base=base,
        )
        return open_package(published.digest, storage=storage, trust=trust, cache_dir=cache_dir)

    return publish


@pytest.fixture
def base(publish_text: Publish, language_model_dir: Path) -> ModelPackage:
    return publish_text(language_model_dir)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([[1, 2, 3]])).logits
    return found


def test_an_adapter_names_its_base_and_answers_with_it(
    publish_text: Publish, base: ModelPackage, adapter_dir: Path
) -> None:
    package = publish_text(adapter_dir, base)
    assert package.manifest.adapter is not None
    assert package.manifest.adapter.base_digest == base.digest
    assert package.manifest.language_model is not None
    assert package.manifest.language_model.architecture == "LlamaForCausalLM"
    assert Manifest.from_bytes(package.manifest.to_bytes()) == package.manifest
    assert package.manifest.golden.outputs != base.manifest.golden.outputs
    golden.replay(package, base)
    with pytest.raises(PackageError, match="without its base"):
        golden.replay(package)


def test_other_kinds_are_written_as_before_there_were_adapters(base: ModelPackage) -> None:
    assert "adapter" not in json.loads(base.manifest.to_bytes())


def test_merging_changes_no_answer(
    language_model_dir: Path, adapter_dir: Path, tmp_path: Path
) -> None:
    parity = merge_into(tmp_path / "merged", language_model_dir, adapter_dir, ["Once upon"])
    assert parity["largest_difference"] <= parity["tolerance"] < 0.1
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="float32")
    adapted = logits(load_adapted(language_model_dir, adapter_dir))
    assert torch.allclose(logits(merged), adapted, atol=1e-4)
    assert torch.allclose(logits(load_merged(language_model_dir, adapter_dir)), adapted, atol=1e-4)
    plain = AutoModelForCausalLM.from_pretrained(language_model_dir, dtype="float32")
    assert not torch.allclose(logits(plain), adapted, atol=1e-2)
    assert not (tmp_path / "merged/adapter_config.json").exists()
    assert (tmp_path / "merged/tokenizer.json").exists()


def test_a_merge_that_loses_the_adapter_is_refused(
    language_model_dir: Path, adapter_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_merge", lambda adapted: adapted.unload())
    with pytest.raises(ParityError, match=r"differs by .*expected at most"):
        merge_into(tmp_path / "merged", language_model_dir, adapter_dir, ["Once upon"])
    assert not (tmp_path / "merged").exists()


def test_an_adapter_of_another_base_is_refused(
    language_model_dir: Path, adapter_dir: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(language_model_dir, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(other, num_hidden_layers=1)
    (other / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    model.save_pretrained(other)
    with pytest.raises(PackageError, match="use the base that it was trained on"):
        load_adapted(other, adapter_dir)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"peft_type": "IA3"}, PackageError, "peft_type 'IA3', expected 'LORA'"),
        ({"megatron_config": {"a": 1}}, ForbiddenFileError, "megatron_config"),
        ({"auto_mapping": {"parent_library": "x"}}, ForbiddenFileError, "auto_mapping"),
    ],
)
def test_configurations_that_do_more_than_lora_are_refused(
    publish_text: Publish,
    base: ModelPackage,
    adapter_dir: Path,
    change: dict[str, object],
    error: type[Exception],
    message: str,
) -> None:
    path = adapter_dir / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(error, match=message):
        publish_text(adapter_dir, base)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "tokenizer.json"])
def test_an_adapter_that_is_not_whole_is_refused(
    publish_text: Publish, base: ModelPackage, adapter_dir: Path, name: str
) -> None:
    (adapter_dir / name).unlink()
    with pytest.raises(MissingFileError, match=name):
        publish_text(adapter_dir, base)


def test_an_adapter_needs_the_package_of_its_base(
    publish_text: Publish, base: ModelPackage, adapter_dir: Path
) -> None:
    with pytest.raises(PackageError, match="packaged with the package of its base"):
        publish_text(adapter_dir)
    with pytest.raises(PackageError, match="packaged with the package of its base"):
        publish_text(adapter_dir, publish_text(adapter_dir, base))
