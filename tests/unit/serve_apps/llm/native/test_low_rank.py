"""Adapters in one batch give what peft gives for each of them alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.errors import NotFoundError, PackageError
from cluster.model_package.adapter import load_adapted
from cluster.model_package.language_model import load_reference
from serve_apps.llm.budget import CacheBudget
from serve_apps.llm.engine import EngineRequest, Sampling, TokenLogprobs
from serve_apps.llm.native.engine import NativeEngine
from serve_apps.llm.native.model import NativeModel
from tests.tiny_models import save_llama

BUDGET = CacheBudget(max_cache_bytes=2**21, max_running=8, max_batch_tokens=24)
PROMPT = tuple(range(40, 80))
"""Longer than a step's budget and than two blocks of the cache, which others might share."""
# The lowest rank, all projections, a part of the joined ones alone; alpha other than the rank.
KINDS: dict[str, dict[str, Any]] = {
    "a": {"r": 1, "lora_alpha": 3, "target_modules": ["v_proj"]},
    "b": {"r": 4, "target_modules": "all-linear"},
    "c": {"r": 3, "target_modules": ["q_proj", "k_proj", "gate_proj"], "use_rslora": True},
}


def save_adapter(directory: Path, base_dir: Path, seed: int, **options: Any) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype="float32")
    values = {"task_type": "CAUSAL_LM", "init_lora_weights": False, "lora_alpha": 8}
    get_peft_model(base, LoraConfig(**values | options)).save_pretrained(directory)
    (directory / "tokenizer.json").write_bytes((base_dir / "tokenizer.json").read_bytes())
    return directory


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "base"
    return save_llama(directory, "some text", architecture="Qwen3", num_attention_heads=4)


@pytest.fixture(scope="module")
def adapter_dirs(base_dir: Path) -> dict[str, Path]:
    return {
        name: save_adapter(base_dir.parent / name, base_dir, seed, **options)
        for seed, (name, options) in enumerate(KINDS.items())
    }


@pytest.fixture
def engine(base_dir: Path, adapter_dirs: dict[str, Path]) -> NativeEngine:
    engine = NativeEngine(NativeModel.load(base_dir, BUDGET), BUDGET)
    for name, directory in adapter_dirs.items():
        engine.load_adapter(name, directory)
    return engine


def ask(adapter: str | None, request_id: str = "", **sampling: Any) -> EngineRequest:
    values: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0, "num_logprobs": 3} | sampling
    return EngineRequest(
        request_id or str(adapter), PROMPT, Sampling(**values), adapter=adapter
    )  # fmt: skip


def run(engine: NativeEngine, *requests: EngineRequest) -> dict[str, list[TokenLogprobs]]:
    for request in requests:
        engine.add(request)
    found: dict[str, list[TokenLogprobs]] = {request.request_id: [] for request in requests}
    num_open = len(requests)
    while num_open:
        for output in engine.step():
            found[output.request_id].extend(output.logprobs)
            num_open -= output.finish_reason is not None
    return found


def tokens(found: list[TokenLogprobs]) -> list[int]:
    return [entry.token_id for entry in found]


@torch.inference_mode()
def check_against(model: Any, found: list[TokenLogprobs]) -> None:
    """Greedy tokens are the reference's, and so are their log-probabilities."""
    ids = torch.tensor([[*PROMPT, *tokens(found)]])
    expected = model(ids).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1)
    for entry, row in zip(found, expected, strict=True):
        assert entry.token_id == int(row.argmax())
        assert entry.logprob == pytest.approx(float(row.max()), abs=1e-4)
        assert [token for token, _ in entry.top] == row.topk(3).indices.tolist()


def test_several_adapters_and_their_base_answer_in_one_batch(
    engine: NativeEngine, base_dir: Path, adapter_dirs: dict[str, Path]
) -> None:
    found = run(engine, ask("a"), ask(None), ask("b"), ask("c"))
    check_against(load_reference(base_dir), found["None"])
    for name, directory in adapter_dirs.items():
        check_against(load_adapted(base_dir, directory), found[name])
    assert len({round(each[0].logprob, 3) for each in found.values()}) == 4


def test_neighbours_change_nothing_and_no_prefix_is_shared_between_adapters(
    engine: NativeEngine,
) -> None:
    requests = [ask(name, temperature=0.9, seed=4) for name in ("a", "b", None)]
    alone = {r.request_id: tokens(run(engine, r)[r.request_id]) for r in requests}
    together = run(engine, *requests)
    assert {name: tokens(found) for name, found in together.items()} == alone
    # Each found its own prompt in the cache again: two full blocks of 16 tokens.
    assert engine.stats().num_reused_tokens == 3 * 32


def test_an_adapter_that_is_not_there_is_named(engine: NativeEngine) -> None:
    with pytest.raises(NotFoundError, match="adapter none is not loaded") as caught:
        engine.add(ask("none"))
    assert caught.value.param == "model"
    engine.unload_adapter("a")
    with pytest.raises(NotFoundError):
        engine.add(ask("a"))
    assert len(run(engine, ask("b"))["b"]) == 12


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_modules": ["lm_head"]}, "lm_head"),
        ({"target_modules": ["q_proj"], "use_dora": True}, "use_dora is True"),
        ({"target_modules": ["q_proj"], "bias": "lora_only"}, "bias is 'lora_only'"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
    ],
)
def test_what_it_cannot_do_beside_others_is_refused(
    engine: NativeEngine, base_dir: Path, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    directory = save_adapter(tmp_path / "adapter", base_dir, 1, **options)
    with pytest.raises(PackageError, match=words) as caught:
        engine.load_adapter("x", directory)
    assert "without shares_base" in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "target"),
    [
        ({"num_hidden_layers": 3}, "q_proj"),
        ({"hidden_size": 48}, "v_proj"),
        ({"num_attention_heads": 2}, "q_proj"),
        ({"intermediate_size": 96}, "down_proj"),
        ({"intermediate_size": 96}, "up_proj"),
    ],
)
def test_an_adapter_of_another_base_is_refused(
    engine: NativeEngine, tmp_path: Path, shape: dict[str, int], target: str
) -> None:
    shape = {"num_attention_heads": 4} | shape
    other = save_llama(tmp_path / "other", "some text", architecture="Qwen3", **shape)
    directory = save_adapter(tmp_path / "adapter", other, 1, target_modules=[target])
    with pytest.raises(PackageError, match="does not fit its base"):
        engine.load_adapter("x", directory)


def test_an_adapter_of_another_kind_is_refused(
    engine: NativeEngine, base_dir: Path, tmp_path: Path
) -> None:
    directory = save_adapter(tmp_path / "adapter", base_dir, 1, target_modules=["q_proj"])
    config = json.loads((directory / "adapter_config.json").read_bytes())
    config["peft_type"] = "IA3"
    (directory / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(PackageError, match="peft_type"):
        engine.load_adapter("x", directory)
