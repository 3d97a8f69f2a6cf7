"""Going on from a base: the same model before training, and what it is exported as after."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.config import parse_config
from cluster.errors import ConfigError, HeliostatError, InputError
from cluster.model_package.language_model import load_weights
from cluster.processing.text import TextProcessor
from cluster.storage import Storage
from jobs.data.catalog import DatasetCatalog
from jobs.data.config import DataConfig
from jobs.data.dataset import Dataset
from jobs.models.config import PretrainedLmConfig
from jobs.models.families import make_family
from jobs.models.family import DataShape, Family
from jobs.models.pretrained import PretrainedLm
from jobs.training.loop import to_batch
from tests.tiny_models import CHAT_TEMPLATE, END, save_llama

ARCHITECTURES = ["Llama", "Qwen2", "Qwen3", "Mistral"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pretrained")


@pytest.fixture(scope="module")
def bases(root: Path) -> dict[str, Path]:
    return {name: save_llama(root / name, "text", architecture=name) for name in ARCHITECTURES}


@pytest.fixture(scope="module")
def chat(root: Path, bases: dict[str, Path]) -> Dataset:
    (root / "template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    with (root / "chat.jsonl").open("w", encoding="utf-8") as file:
        for number in range(40):
            turns = [("user", f"say {number}"), ("assistant", f"{number}, 定日镜")]
            messages = [{"role": role, "content": content} for role, content in turns]
            file.write(json.dumps({"messages": messages}) + "\n")
    tokenizer = {
        "kind": "existing",
        "path": str(bases["Llama"]),
        "chat_template": str(root / "template.jinja"),
    }
    config = DataConfig(
        name="chat",
        source={"kind": "chat", "paths": [str(root / "chat.jsonl")]},
        text={"tokenizer": tokenizer, "sequence_length": 48},
    )
    return DatasetCatalog(Storage.open(str(root / "storage")), root / "cache").ensure(config)[0]


def family(dataset: Dataset, base: Path, **lora: Any) -> Family:
    values = {"family": "causal_lm", "base": str(base)}
    config = PretrainedLmConfig.model_validate({**values, "lora": lora} if lora else values)
    made = make_family(config, DataShape.of(dataset.info))
    assert isinstance(made, PretrainedLm)
    return made


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(1, 9).unsqueeze(0)).logits
    return found


def train_a_little(model: torch.nn.Module, family: Family, dataset: Dataset) -> None:
    batch = to_batch(dataset.rows("train").read(np.arange(4)), CPU)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(3):
        family.loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_shape_is_gone_on_from_trained_and_exported(
    chat: Dataset, bases: dict[str, Path], tmp_path: Path, architecture: str
) -> None:
    made = family(chat, bases[architecture])
    model = made.build()
    before = AutoModelForCausalLM.from_pretrained(bases[architecture], dtype="float32")
    assert torch.equal(logits(model), logits(before))
    train_a_little(model, made, chat)
    exported = made.export(model.eval(), chat, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    assert (exported.kind, type(loaded)) == ("language_model", type(before))
    assert torch.allclose(logits(loaded), logits(model), atol=1e-6)
    assert not torch.allclose(logits(loaded), logits(before), atol=1e-3)
    assert loaded.config.use_cache


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_lora_begins_as_the_base_and_trains_what_it_added(
    chat: Dataset, bases: dict[str, Path], tmp_path: Path, architecture: str
) -> None:
    from peft import PeftModel

    made = family(chat, bases[architecture], rank=2, alpha=8)
    model = made.build()
    base = AutoModelForCausalLM.from_pretrained(bases[architecture], dtype="float32")
    assert type(model) is type(base)
    assert torch.allclose(logits(model), logits(base), atol=1e-6)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * 2  # layers, matrices of a layer, factors
    assert all("lora_" in name for name in trained)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    train_a_little(model, made, chat)
    assert all(torch.equal(model.get_parameter(name), value) for name, value in frozen.items())
    exported = made.export(model.eval(), chat, tmp_path)
    assert exported.kind == "adapter"
    names = {path.name for path in tmp_path.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"} <= names
    assert "config.json" not in names
    adapted = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    assert torch.allclose(logits(adapted), logits(model), atol=1e-5)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "q_proj" in config["target_modules"]
    assert str(tmp_path.parent) not in json.dumps(config)


def test_only_answers_are_learnt(chat: Dataset, bases: dict[str, Path]) -> None:
    """The reference is transformers' own loss, told which labels to ignore."""
    made = family(chat, bases["Llama"])
    plain = AutoModelForCausalLM.from_pretrained(bases["Llama"], dtype="float32")
    batch = to_batch(chat.rows("train").read(np.arange(3)), CPU)
    packed = batch["loss_mask"].numpy().astype(np.uint8)
    mask = torch.from_numpy(np.unpackbits(packed, axis=1)[:, : batch["tokens"].shape[1]]).bool()
    labels = batch["tokens"].masked_fill(~mask, -100)
    reference = plain(input_ids=batch["tokens"], labels=labels).loss
    num_units = made.num_units(batch)
    assert int(num_units) == int(mask[:, 1:].sum()) < mask[:, 1:].numel() / 2
    assert float(made.loss(made.build(), batch)) / float(num_units) == pytest.approx(
        float(reference), rel=1e-4
    )
    learnt = TextProcessor.load(chat.tokenizer_dir)
    assert "say" not in learnt.decode(batch["tokens"][mask].tolist())
    assert "定日镜" in learnt.decode(batch["tokens"][mask].tolist())


def test_an_export_answers_with_the_template_it_learnt_and_ends_as_it_learnt(
    chat: Dataset, bases: dict[str, Path], tmp_path: Path
) -> None:
    made = family(chat, bases["Qwen3"])
    made.export(made.build(), chat, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    asked = [{"role": "user", "content": "say 3"}]
    rendered = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    text = TextProcessor.load(tmp_path)
    assert text.render_chat(asked) == rendered == "user: say 3\nassistant: "
    end = tokenizer.convert_tokens_to_ids(END)
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation["eos_token_id"] == end


def test_tokens_that_end_a_turn_end_an_answer_too(
    chat: Dataset, bases: dict[str, Path], tmp_path: Path, root: Path
) -> None:
    """As in published models, whose chat template ends a turn otherwise than a text ends."""
    base = save_llama(root / "turns", "text", vocab_size=258)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    tokenizer.chat_template = CHAT_TEMPLATE.replace("{{ eos_token }}", "<turn>")
    tokenizer.save_pretrained(base)
    values = chat.info.config.model_dump()
    values["text"]["tokenizer"] = {"kind": "existing", "path": str(base)}
    catalog = DatasetCatalog(Storage.open(str(root / "storage")), root / "cache")
    dataset, _ = catalog.ensure(DataConfig.model_validate(values))
    made = family(dataset, base)
    made.export(made.build(), dataset, tmp_path)
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [0, 257]


def test_a_base_on_meta_has_its_shape_and_reads_no_weights(
    chat: Dataset, bases: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes((bases["Qwen3"] / "config.json").read_bytes())
    with torch.device("meta"):
        model = family(chat, tmp_path, rank=4).build()
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    whole = family(chat, bases["Qwen3"], rank=4).build()
    assert [p.shape for p in model.parameters()] == [p.shape for p in whole.parameters()]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"vocab_size": 100}, "tokenizer has 257 tokens, and model.base knows 100"),
        ({"max_position_embeddings": 32}, "sequence_length is 48, and model.base holds 32 tokens"),
    ],
)
def test_a_base_that_is_too_small_is_refused(
    chat: Dataset, bases: dict[str, Path], tmp_path: Path, shape: dict[str, int], message: str
) -> None:
    config = json.loads((bases["Llama"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **shape}))
    with pytest.raises(InputError, match=message) as caught:
        family(chat, tmp_path)
    assert caught.value.hint


def test_an_unknown_architecture_is_refused_in_one_line(chat: Dataset, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "of_my_own"}')
    with pytest.raises(HeliostatError, match=r"model\.base") as caught:
        family(chat, tmp_path)
    assert "\n" not in str(caught.value)


def test_matrices_that_the_base_lacks_are_refused(chat: Dataset, bases: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"no matrices 'qkv'; expected some of: down_proj"):
        family(chat, bases["Llama"], target_modules=["q_proj", "qkv"]).build()
    model = family(chat, bases["Llama"], target_modules=["q_proj"]).build()
    assert sum(p.requires_grad for p in model.parameters()) == 2 * 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"base": "a/b", "hidden_size": 8}, "'hidden_size' is decided by 'base'"),
        ({"base": "a/b", "lora": {"target_modules": ["lm_head"]}}, "'lm_head' lies outside"),
        ({"lora": {}}, "unknown key.*lora"),
        ({"base": ""}, "base"),
    ],
)
def test_a_config_that_is_neither_fresh_nor_given_is_refused(
    values: dict[str, Any], message: str
) -> None:
    from jobs.training.config import TrainConfig

    digits = {"name": "d", "source": {"kind": "python_topics"}}
    whole = {"name": "n", "data": digits, "steps": 1, "batch_size": 1}
    model = {"family": "causal_lm", **values}
    with pytest.raises(ConfigError, match=message):
        parse_config({**whole, "model": model}, TrainConfig, source="train")


def test_a_base_names_no_credentials() -> None:
    for base in ("s3://KEY:SECRET@bucket/model", "s3://KEY:SEC/RET@bucket/model?region=x"):
        values = {"family": "causal_lm", "base": base}
        with pytest.raises(ConfigError, match="credentials belong in the environment") as caught:
            parse_config(values, PretrainedLmConfig, source="train.yaml")
        assert "SEC" not in str(caught.value)


def test_weights_of_another_shape_than_the_base_says_are_named(tmp_path: Path) -> None:
    directory = save_llama(tmp_path / "base", "text")
    config = json.loads((directory / "config.json").read_text())
    config["intermediate_size"] *= 2
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        HeliostatError, match=r"weight '.*mlp.*' has shape \[.*config\.json says \["
    ):
        load_weights(directory)
