"""Language models are measured on any text, in their own tokens, as transformers measures them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import AutoModelForCausalLM

from cluster.config import parse_config
from cluster.errors import InputError
from cluster.model_package import (
    LocalSigner,
    ModelPackage,
    ensure_local_key,
    open_digest,
    write_package,
)
from cluster.settings import Settings
from cluster.storage import Storage
from jobs.data.config import DataConfig
from jobs.data.dataset import Dataset
from jobs.data.packing import pack
from jobs.evaluate import EVALUATORS
from jobs.evaluation.config import EvaluateConfig
from jobs.evaluation.evaluation import Evaluation
from jobs.prepare import open_catalog
from jobs.promote import _compare
from jobs.promotion.config import ServiceConfig
from tests.tiny_models import save_adapter

LENGTH = 32
CONFIG = EvaluateConfig(model="m", split="test", batch_size=5)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    home = tmp_path_factory.mktemp("home")
    ensure_local_key(home / "keys")
    lines = (f"In {n} days the sun rose {n} times, 日出{n}次.\n" for n in range(130))
    (home / "text.txt").write_text("".join(lines))
    return Settings(home=home)


def prepare(settings: Settings, **tokenizer: object) -> Dataset:
    values = {
        "name": "suns",
        "source": {"kind": "text", "paths": [str(settings.home / "text.txt")]},
        "splits": {"by": "position", "test": 0.2},
        "text": {"tokenizer": tokenizer, "sequence_length": LENGTH},
    }
    dataset, _ = open_catalog(settings).ensure(parse_config(values, DataConfig, source="test"))
    return dataset


@pytest.fixture(scope="module")
def byte_rows(settings: Settings, language_model_dir: Path) -> Dataset:
    return prepare(settings, kind="existing", path=str(language_model_dir))


@pytest.fixture(scope="module")
def bpe_rows(settings: Settings) -> Dataset:
    return prepare(settings, kind="bpe", vocab_size=300)


def publish(settings: Settings, directory: Path, base: ModelPackage | None = None) -> ModelPackage:
    published = write_package(
        directory,
        name="m",
        kind="adapter" if base else "language_model",
        storage=Storage.open(settings.storage_root),
        signer=LocalSigner(settings.keys_dir),
        golden_inputs=["once"],
        base=base,
    )
    return open_digest(published.digest, settings)


@pytest.fixture(scope="module")
def package(settings: Settings, language_model_dir: Path) -> ModelPackage:
    return publish(settings, language_model_dir)


def evaluate(package: ModelPackage, dataset: Dataset, settings: Settings) -> Evaluation:
    return EVALUATORS[package.manifest.kind](package, dataset, CONFIG, settings)


def reference(model: torch.nn.Module, rows: np.ndarray) -> tuple[float, float]:
    """Summed loss of the rows, and the share of next tokens that are the likeliest."""
    batch = torch.from_numpy(rows.astype(np.int64))
    with torch.inference_mode():
        logits = model(batch[:, :-1]).logits.float()
    labels = batch[:, 1:]
    loss = functional.cross_entropy(logits.transpose(1, 2), labels, reduction="sum")
    return float(loss), float((logits.argmax(-1) == labels).float().mean())


def test_metrics_are_those_of_transformers_on_the_same_tokens(
    settings: Settings, package: ModelPackage, byte_rows: Dataset, language_model_dir: Path
) -> None:
    rows = byte_rows.rows("test")
    tokens = rows.read(np.arange(len(rows)))["tokens"]
    loss, hits = reference(AutoModelForCausalLM.from_pretrained(language_model_dir), tokens)
    found = evaluate(package, byte_rows, settings)
    mean = loss / tokens[:, 1:].size
    assert found.metrics["loss"] == pytest.approx(mean, rel=1e-5)
    assert found.metrics["perplexity"] == pytest.approx(math.exp(mean), rel=1e-4)
    assert found.metrics["next_token_accuracy"] == pytest.approx(hits)
    # Its tokens are bytes; the ends of documents are none.
    num_ends = (tokens[:, 1:] == byte_rows.text.end_id).sum()
    num_bytes = tokens[:, 1:].size - num_ends
    assert found.metrics["bits_per_byte"] == pytest.approx(loss / math.log(2) / num_bytes, rel=0.02)
    assert found.row_values["loss"].mean() == pytest.approx(mean, rel=1e-5)


def test_text_for_another_tokenizer_is_measured_in_the_models_own_tokens(
    settings: Settings, package: ModelPackage, bpe_rows: Dataset, language_model_dir: Path
) -> None:
    rows = bpe_rows.rows("test")
    theirs = Tokenizer.from_file(str(bpe_rows.tokenizer_path))
    text = theirs.decode(rows.read(np.arange(len(rows)))["tokens"][:, 1:].reshape(-1).tolist())
    ours = Tokenizer.from_file(str(language_model_dir / "tokenizer.json"))
    packed = pack(np.array(ours.encode(text).ids), LENGTH)
    loss, hits = reference(AutoModelForCausalLM.from_pretrained(language_model_dir), packed)
    found = evaluate(package, bpe_rows, settings)
    assert found.metrics["loss"] == pytest.approx(loss / packed[:, 1:].size, rel=1e-5)
    assert found.metrics["next_token_accuracy"] == pytest.approx(hits)
    # A token is a byte, so both units give the same; the end of the text fills no row.
    bits = found.metrics["loss"] / math.log(2)
    assert found.metrics["bits_per_byte"] == pytest.approx(bits, rel=2e-3)


def test_an_adapter_is_measured_on_its_base(
    settings: Settings, package: ModelPackage, byte_rows: Dataset, language_model_dir: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    from peft import PeftModel

    adapter_dir = save_adapter(tmp_path / "adapter", language_model_dir)
    rows = byte_rows.rows("test")
    tokens = rows.read(np.arange(len(rows)))["tokens"]
    base = AutoModelForCausalLM.from_pretrained(language_model_dir, dtype=torch.float32)
    loss, _ = reference(PeftModel.from_pretrained(base, str(adapter_dir)).eval(), tokens)
    adapter = publish(settings, adapter_dir, package)
    found = evaluate(adapter, byte_rows, settings)
    assert found.metrics["loss"] == pytest.approx(loss / tokens[:, 1:].size, rel=1e-5)
    assert found.metrics["loss"] != evaluate(package, byte_rows, settings).metrics["loss"]


def test_losses_of_other_tokens_are_not_compared(
    settings: Settings, package: ModelPackage, byte_rows: Dataset, bpe_rows: Dataset
) -> None:
    service = ServiceConfig(
        service="s", model="m", owner="o", purpose="p", metric="loss", objective=9,
        budget={"max_regression": 0.1},
    )  # fmt: skip
    same = evaluate(package, byte_rows, settings)
    assert _compare(service, same, evaluate(package, byte_rows, settings)).mean_difference == 0
    with pytest.raises(InputError, match="other tokens"):
        _compare(service, same, evaluate(package, bpe_rows, settings))


def test_text_has_no_columns_to_slice_by(
    settings: Settings, package: ModelPackage, byte_rows: Dataset
) -> None:
    config = CONFIG.model_copy(update={"slice_by": "author"})
    with pytest.raises(InputError, match="no columns to slice by"):
        EVALUATORS["language_model"](package, byte_rows, config, settings)


def test_a_model_that_answers_nan_is_refused(
    settings: Settings, byte_rows: Dataset, package: ModelPackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jobs.evaluation import language_model

    model = AutoModelForCausalLM.from_pretrained(package.model_dir)
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("nan"))
    monkeypatch.setattr(language_model, "load_reference", lambda _directory: model)
    with pytest.raises(InputError, match="'loss' of row 0 is no finite number"):
        evaluate(package, byte_rows, settings)
