"""The native model computes what transformers computes, for every shape that it reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from cluster.errors import PackageError
from serve_apps.llm.budget import CacheBudget
from serve_apps.llm.engine import EngineRequest, Sampling
from serve_apps.llm.native.batch import BlockTables, make_batch
from serve_apps.llm.native.blocks import BlockPool
from serve_apps.llm.native.engine import NativeEngine
from serve_apps.llm.native.model import NativeModel
from serve_apps.llm.native.quantised import Int8Linear
from serve_apps.llm.native.scheduler import Scheduler, Sequence
from tests.tiny_models import save_llama

BUDGET = CacheBudget(max_cache_bytes=2**22, max_running=8, max_batch_tokens=24)
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama_with_biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_with_a_head": ("Llama", {"tie_word_embeddings": False}),
    "llama_without_groups": ("Llama", {"num_key_value_heads": 4}),
    "llama_with_one_group": ("Llama", {"num_key_value_heads": 1}),
    "linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}),
    "dynamic": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}),
    "yarn": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "llama3": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "qwen2": ("Qwen2", {}),
    "qwen2_with_a_window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {}),
    "qwen3_with_windows": (
        "Qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral_with_a_window": ("Mistral", {"sliding_window": 17}),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' model of random weights, its biases and norms included."""
    architecture, options = SHAPES[name]
    values = {
        "vocab_size": 97,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 80,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        **options,
    }
    if "rope_parameters" in values:
        values["rope_parameters"] = {"rope_theta": 10000.0, **values["rope_parameters"]}
    torch.manual_seed(1)
    torch.set_num_threads(1)
    config = getattr(transformers, f"{architecture}Config")(**values)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config).eval()
    for parameter_name, parameter in model.named_parameters():
        is_norm = "norm" in parameter_name
        torch.nn.init.normal_(parameter, mean=1.0 if is_norm else 0.0, std=0.2)
    return model.to(dtype)


def native(model: Any, budget: CacheBudget = BUDGET) -> NativeModel:
    return NativeModel(model.config, model.state_dict(), budget, dtype=model.dtype)


def logits_of(model: NativeModel, tokens: list[int]) -> torch.Tensor:
    """Logits after every token of a prompt: by chunks first, one by one afterwards."""
    scheduler = Scheduler(BlockPool(model.num_blocks), max_running=2, max_batch_tokens=24)
    tables = BlockTables(2, model.max_context_tokens)
    request = EngineRequest("r", tuple(tokens[:60]), Sampling(max_tokens=128 - 60))
    sequence = Sequence(request, seed=0)
    scheduler.add(sequence)
    found = []
    for step in range(len(tokens)):
        (chunk,) = scheduler.plan()
        batch = make_batch([chunk], tables, model.shape, dtype=model.dtype, device="cpu")
        logits = model.forward(batch).logits
        if chunk.gives_token:
            found.append(logits)
        scheduler.advance(chunk)
        if sequence.num_computed == len(tokens):
            break
        if sequence.num_computed == len(sequence.tokens):
            sequence.tokens.append(tokens[sequence.num_computed])
        assert step < len(tokens) - 1
    return torch.cat(found)


@pytest.mark.parametrize("name", SHAPES)
def test_logits_and_greedy_tokens_are_those_of_transformers(name: str) -> None:
    theirs = build(name)
    ours = native(theirs)
    tokens = torch.randint(0, 97, (100,), generator=torch.Generator().manual_seed(2)).tolist()
    with torch.inference_mode():
        expected = theirs(torch.tensor([tokens])).logits[0, 59:]
    torch.testing.assert_close(logits_of(ours, tokens), expected, rtol=1e-4, atol=1e-4)
    answer = theirs.generate(
        torch.tensor([tokens[:30]]), max_new_tokens=60, do_sample=False, eos_token_id=None
    )[0, 30:].tolist()
    assert greedy(NativeEngine(ours, BUDGET), tokens[:30], 60) == answer


@pytest.mark.parametrize("name", ["llama", "qwen3_with_windows"])
def test_logits_in_16_bits_are_those_of_transformers(name: str) -> None:
    theirs = build(name, torch.bfloat16)
    reference = build(name, torch.bfloat16).float()
    tokens = torch.randint(0, 97, (100,), generator=torch.Generator().manual_seed(2)).tolist()
    with torch.inference_mode():
        exact = reference(torch.tensor([tokens])).logits[0, 59:]
        their_error = (theirs(torch.tensor([tokens])).logits[0, 59:].float() - exact).abs()
    our_error = (logits_of(native(theirs), tokens).float() - exact).abs()
    # Both round, in different places: ours is not to be further from the truth.
    assert our_error.mean() <= 1.2 * their_error.mean()
    assert our_error.max() <= 0.05 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_in_8_bits_are_near(dtype: torch.dtype) -> None:
    theirs = build("qwen2", dtype)
    tokens = torch.randint(0, 97, (100,), generator=torch.Generator().manual_seed(2)).tolist()
    with torch.inference_mode():
        exact = theirs.float()(torch.tensor([tokens])).logits[0, 59:]
    ours = NativeModel(theirs.config, theirs.state_dict(), BUDGET, dtype=dtype, is_int8=True)
    assert ours.precision == "int8"
    error = (logits_of(ours, tokens).float() - exact).abs()
    assert 0 < error.mean() <= 0.02 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 2, 65])
def test_a_matrix_in_8_bits_multiplies_with_what_it_says(num_rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(48, 64).to(dtype), torch.randn(48).to(dtype)
    weight[3] = 0  # has no scale of its own
    x, other = torch.randn(num_rows, 64).to(dtype), torch.randn(num_rows, 48).to(dtype)
    rounded = Int8Linear(weight, bias)
    exact = x.float() @ weight.float().T + bias.float()
    near = {"rtol": 0.02, "atol": 0.3}
    torch.testing.assert_close(rounded(x).float(), exact, **near)
    torch.testing.assert_close(rounded.times(x, other).float(), exact * other.float(), **near)
    torch.testing.assert_close(rounded.plus(x, other).float(), exact + other.float(), **near)
    silu = torch.nn.functional.silu(exact)
    torch.testing.assert_close(rounded.silu(x).float(), silu, **near)


def test_a_trained_directory_is_read_and_answers_as_transformers_does(tmp_path: Path) -> None:
    text = "the mirror follows the sun and keeps its rays on one target"
    directory = save_llama(tmp_path / "model", text, steps=60, architecture="Qwen3")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="float32").eval()
    prompt = list(text[:8].encode())
    answer = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=40, do_sample=False, eos_token_id=None
    )[0, len(prompt) :].tolist()
    ours = NativeModel.load(directory, BUDGET)
    assert ours.dtype == torch.float32
    assert greedy(NativeEngine(ours, BUDGET), prompt, 40) == answer


def test_weights_stored_in_16_bits_stay_so(tmp_path: Path) -> None:
    build("llama", torch.bfloat16).save_pretrained(tmp_path)
    assert NativeModel.load(tmp_path, BUDGET).dtype == torch.bfloat16
    assert NativeModel.load(tmp_path, BUDGET, dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "gpt2"}, "models of type 'gpt2' are not among"),
        ({"hidden_act": "gelu"}, "its activation is 'gelu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "stored quantised"),
    ],
)
def test_what_it_cannot_run_it_refuses(change: dict[str, Any], reason: str) -> None:
    theirs = build("llama")
    for key, value in change.items():
        setattr(theirs.config, key, value)
    with pytest.raises(PackageError, match=reason):
        native(theirs)


def test_weights_that_do_not_fit_are_named() -> None:
    theirs = build("llama")
    weights = theirs.state_dict()
    name = "model.layers.1.self_attn.o_proj.weight"
    with pytest.raises(PackageError, match=f"weight '{name}' has shape"):
        NativeModel(theirs.config, weights | {name: weights[name][:, 1:]}, BUDGET)
    del weights[name]
    with pytest.raises(PackageError, match=f"lack '{name}'"):
        NativeModel(theirs.config, weights, BUDGET)


def greedy(engine: NativeEngine, prompt: list[int], max_tokens: int) -> list[int]:
    engine.add(EngineRequest("g", tuple(prompt), Sampling(max_tokens=max_tokens, temperature=0)))
    answer: list[int] = []
    while len(answer) < max_tokens:
        for output in engine.step():
            answer.extend(output.token_ids)
    return answer
