"""What every engine must do: one suite, run on each engine that is present."""

from __future__ import annotations

import functools
import importlib.util
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import InputError, NotFoundError, UpstreamFailedError
from cluster.generation import Grammar
from serve_apps.llm.engine import (
    AdapterLoader,
    Engine,
    EngineRequest,
    Sampling,
    TokenLogprobs,
    TokenOutput,
)
from serve_apps.llm.fake import FakeEngine

VOCAB_SIZE = 97
CONTEXT_TOKENS = 128


def fake_engine() -> Engine:
    return FakeEngine(vocab_size=VOCAB_SIZE, max_context_tokens=CONTEXT_TOKENS)


def continuous_batching_engine() -> Engine:
    import torch

    from serve_apps.llm.continuous_batching import CacheBudget, ContinuousBatchingEngine

    return ContinuousBatchingEngine(
        tiny_llama(torch), CacheBudget(max_cache_bytes=2**20, max_running=8, max_batch_tokens=64)
    )


def native_engine() -> Engine:
    import torch

    from serve_apps.llm.budget import CacheBudget
    from serve_apps.llm.native.engine import NativeEngine
    from serve_apps.llm.native.model import NativeModel

    budget = CacheBudget(max_cache_bytes=2**20, max_running=8, max_batch_tokens=64)
    model = tiny_llama(torch)
    return NativeEngine(NativeModel(model.config, model.state_dict(), budget), budget)


def vllm_engine() -> Engine:
    import torch

    from serve_apps.llm.vllm import VllmEngine
    from serve_apps.vllm_arguments import VllmArguments

    with tempfile.TemporaryDirectory() as directory:
        tiny_llama(torch).save_pretrained(directory)
        return VllmEngine.load(
            Path(directory),
            # With all places taken, its CPU build gives the model's own rows the last adapter.
            VllmArguments(enforce_eager=True, max_loras=3, max_lora_rank=8),
            dtype="float32",
            max_cache_bytes=2**24,
            max_running=8,
        )


def tiny_llama(torch: Any) -> Any:
    from transformers import LlamaForCausalLM

    torch.set_num_threads(1)
    model = LlamaForCausalLM(tiny_config()).eval()
    # Made once: threads of engines that run already may draw from the same generator.
    model.load_state_dict(tiny_weights())
    return model


@functools.cache
def tiny_weights() -> Any:
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config())
    # Spread the logits, so that no two tokens are nearly tied.
    model.lm_head.weight.data.mul_(20)
    return model.state_dict()


def tiny_config() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        head_dim=32,  # vLLM has no kernels for smaller ones
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_TOKENS,
    )


# Those that answer with tiny_llama, each where its library is installed.
MODEL_ENGINES: list[Callable[[], Engine]] = [continuous_batching_engine, native_engine]
if importlib.util.find_spec("vllm") is not None:
    MODEL_ENGINES.append(vllm_engine)
# Those whose samples are drawn by cluster/sampling.py, so that they agree among each other.
OUR_NOISE = [engine for engine in MODEL_ENGINES if engine is not vllm_engine]


Started = Callable[[Callable[[], Engine]], Engine]


@pytest.fixture(scope="module")
def started() -> Iterator[Started]:
    """Engines that are started once, for vLLM's take half a minute."""
    engines: dict[Callable[[], Engine], Engine] = {}

    def start(build: Callable[[], Engine]) -> Engine:
        if build not in engines:
            engines[build] = build()
        return engines[build]

    yield start
    for engine in engines.values():
        engine.close()


@pytest.fixture(params=[fake_engine, *MODEL_ENGINES])
def engine(request: pytest.FixtureRequest, started: Started) -> Engine:
    return started(request.param)


@pytest.fixture(params=MODEL_ENGINES)
def model_engine(request: pytest.FixtureRequest, started: Started) -> Engine:
    return started(request.param)


def ask(request_id: str, prompt: tuple[int, ...] = (5, 6, 7), **sampling: Any) -> EngineRequest:
    values = {"max_tokens": 12, "temperature": 0.0} | sampling
    return EngineRequest(request_id, prompt, Sampling(**values))


def run(engine: Engine, *requests: EngineRequest) -> dict[str, list[int]]:
    """Each request's tokens."""
    return {key: tokens for key, (tokens, _) in run_with_reasons(engine, *requests).items()}


def run_with_reasons(
    engine: Engine, *requests: EngineRequest
) -> dict[str, tuple[list[int], str | None]]:
    for request in requests:
        engine.add(request)
    tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
    reasons: dict[str, str | None] = {}
    while len(reasons) < len(requests):
        for output in engine.step():
            assert output.request_id not in reasons, "nothing may follow the last output"
            tokens[output.request_id].extend(output.token_ids)
            if output.finish_reason is not None:
                reasons[output.request_id] = output.finish_reason
    return {key: (tokens[key], reasons[key]) for key in tokens}


def test_a_greedy_answer_is_always_the_same(engine: Engine) -> None:
    first = run(engine, ask("a"))["a"]
    assert len(first) == 12
    assert run(engine, ask("a"))["a"] == first


def test_an_answer_does_not_depend_on_its_neighbours(engine: Engine) -> None:
    prompts = [(3, 1, 4), (1, 5, 9, 2, 6), tuple(range(2, 60))]
    sampling = [{}, {"temperature": 0.9, "seed": 5}, {"temperature": 1.0, "top_k": 9, "seed": 6}]
    requests = [
        ask(f"r{i}", prompt, **options)
        for i, (prompt, options) in enumerate(zip(prompts, sampling, strict=True))
    ]
    together = run(engine, *requests)
    for request in requests:
        assert run(engine, request)[request.request_id] == together[request.request_id]


def test_a_seed_repeats_an_answer_and_another_seed_changes_it(engine: Engine) -> None:
    answers = [
        run(engine, ask("s", temperature=1.5, seed=seed, max_tokens=24))["s"] for seed in (7, 7, 8)
    ]
    assert answers[0] == answers[1] != answers[2]


def test_without_a_seed_answers_vary(engine: Engine) -> None:
    # False failure: two 24-token samples at temperature 1.5 agreeing, far below 1e-9.
    first, second = (run(engine, ask("v", temperature=1.5, max_tokens=24))["v"] for _ in range(2))
    assert first != second


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_the_narrowest_sampling_is_greedy(engine: Engine, narrow: dict[str, Any]) -> None:
    greedy = run(engine, ask("g"))["g"]
    assert run(engine, ask("n", temperature=1.0, seed=1, **narrow))["n"] == greedy


def test_an_answer_ends_at_max_tokens(engine: Engine) -> None:
    assert run_with_reasons(engine, ask("m", max_tokens=1))["m"][1] == "length"
    tokens, reason = run_with_reasons(engine, ask("m", max_tokens=5))["m"]
    assert (len(tokens), reason) == (5, "length")


def test_an_answer_ends_with_the_end_of_sequence_token(engine: Engine) -> None:
    free = run(engine, ask("f"))["f"]
    eos = free[2]
    tokens, reason = run_with_reasons(engine, ask("e", eos_token_ids=(eos,)))["e"]
    assert tokens == free[: free.index(eos) + 1]
    assert reason == "stop"


def test_one_step_speaks_for_all_running_requests(engine: Engine) -> None:
    for i in range(4):
        engine.add(ask(f"b{i}", max_tokens=20))
    largest = 0
    finished = 0
    while finished < 4:
        outputs = engine.step()
        largest = max(largest, len(outputs))
        finished += sum(output.finish_reason is not None for output in outputs)
    assert largest == 4


def test_an_aborted_request_says_no_more_and_frees_its_place(engine: Engine) -> None:
    engine.add(ask("gone", max_tokens=100))
    while not engine.step():
        pass
    engine.abort("gone")
    engine.abort("never was")
    after: list[TokenOutput] = []
    for _ in range(3):
        after.extend(engine.step())
    assert [output.request_id for output in after] == []
    assert engine.stats().num_running == engine.stats().num_waiting == 0
    assert len(run(engine, ask("next"))["next"]) == 12


def test_a_bias_forces_or_bans_a_token(engine: Engine) -> None:
    assert run(engine, ask("f", logit_bias=((9, 1e4),)))["f"] == [9] * 12
    free = run(engine, ask("g"))["g"]
    banned = tuple((token, -1e4) for token in set(free))
    assert not {*run(engine, ask("b", logit_bias=banned))["b"]} & {*free}


def test_a_penalty_ends_repetition() -> None:
    # Both tokens are favoured far above all others, the first by a little.
    biases = ((8, 50.0), (9, 49.0))
    engine = fake_engine()
    assert {*run(engine, ask("r", logit_bias=biases))["r"]} == {8}
    for penalty in ("presence_penalty", "frequency_penalty"):
        answer = run(engine, ask("p", logit_bias=biases, **{penalty: 2.0}))["p"]
        assert answer[:2] == [8, 9], penalty
        # One is paid once for each token, the other each time.
        assert ({*answer[2:]} == {8, 9}) == (penalty == "frequency_penalty"), penalty


@pytest.mark.parametrize("options", [{}, {"temperature": 1.2, "seed": 3}])
def test_log_probabilities_come_with_their_tokens(engine: Engine, options: dict[str, Any]) -> None:
    engine.add(ask("l", num_logprobs=3, **options))
    tokens: list[int] = []
    found: list[TokenLogprobs] = []
    while len(tokens) < 12:
        for output in engine.step():
            assert len(output.logprobs) == len(output.token_ids)
            tokens.extend(output.token_ids)
            found.extend(output.logprobs)
    assert [entry.token_id for entry in found] == tokens
    assert run(engine, ask("l", **options))["l"] == tokens
    for entry in found:
        logprobs = [logprob for _, logprob in entry.top]
        assert len(logprobs) == 3
        assert logprobs == sorted(logprobs, reverse=True)
        assert entry.logprob <= logprobs[0] <= 0
        assert dict(entry.top).get(entry.token_id, entry.logprob) == pytest.approx(entry.logprob)


def test_log_probabilities_are_not_reported_unasked(engine: Engine) -> None:
    engine.add(ask("u", max_tokens=3))
    outputs: list[TokenOutput] = []
    while not outputs or outputs[-1].finish_reason is None:
        outputs.extend(engine.step())
    assert all(output.logprobs == () for output in outputs)


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (ask("x", prompt=()), "prompt"),
        (ask("x", prompt=(1, VOCAB_SIZE)), "prompt"),
        (ask("x", prompt=(-1,)), "prompt"),
        (ask("x", prompt=(1,) * CONTEXT_TOKENS), "prompt"),
        (ask("x", max_tokens=CONTEXT_TOKENS), "max_tokens"),
        (ask("x", max_tokens=0), "max_tokens"),
        (ask("x", logit_bias=((VOCAB_SIZE, 1.0),)), "logit_bias"),
    ],
)
def test_impossible_requests_are_refused_by_field(
    engine: Engine, request_: EngineRequest, field: str
) -> None:
    with pytest.raises(InputError) as caught:
        engine.add(request_)
    assert caught.value.param == field
    assert engine.stats().num_running == engine.stats().num_waiting == 0


def test_a_refused_request_leaves_the_batch_alone(engine: Engine) -> None:
    good = ask("good", max_tokens=60, temperature=0.8, seed=2)
    alone = run(engine, good)["good"]
    engine.add(good)
    tokens: list[int] = []
    reason = None
    while reason is None:
        for bad in (ask("bad", prompt=()), ask("bad", prompt=(1,) * CONTEXT_TOKENS)):
            with pytest.raises(InputError):
                engine.add(bad)
        for output in engine.step():
            assert output.request_id == "good"
            tokens.extend(output.token_ids)
            reason = output.finish_reason
    assert tokens == alone


def test_it_says_what_it_can_hold(engine: Engine) -> None:
    stats = engine.stats()
    assert (stats.max_context_tokens, stats.vocab_size) == (CONTEXT_TOKENS, VOCAB_SIZE)


def test_more_requests_than_places_are_all_answered(engine: Engine) -> None:
    requests = [ask(f"q{i}", prompt=tuple(range(i + 1, i + 40)), max_tokens=30) for i in range(20)]
    answers = run(engine, *requests)
    assert {len(tokens) for tokens in answers.values()} == {30}


def reference(prompt: tuple[int, ...], sampling: Sampling, model: Any = None) -> list[int]:
    """What transformers' model and the definition of our sampling say, one token at a time."""
    import torch

    from cluster.logits import adjust
    from cluster.sampling import perturb

    model, tokens = model or tiny_llama(torch), [*prompt]
    for position in range(len(prompt), len(prompt) + sampling.max_tokens):
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0, -1]
        scores = adjust(logits, sampling, prompt, tokens[len(prompt) :])
        scores = perturb(scores, sampling, seed=sampling.seed or 0, position=position)
        tokens.append(int(scores.argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.7},
        {"presence_penalty": 2.0},
        {"frequency_penalty": 2.0},
        {"frequency_penalty": 1.5, "presence_penalty": -1.0, "repetition_penalty": 1.2},
        {"logit_bias": ((19, 9.5), (3, -100.0))},
        {"logit_bias": ((19, 9.5),), "frequency_penalty": 2.0},
    ],
)
def test_greedy_tokens_equal_transformers(model_engine: Engine, options: dict[str, Any]) -> None:
    request = ask("g", prompt=(11, 45, 14, 19, 19), max_tokens=30, **options)
    expected = reference(request.prompt_ids, request.sampling)
    assert run(model_engine, request)["g"] == expected
    if options:
        assert expected != reference(request.prompt_ids, ask("f", max_tokens=30).sampling)


@pytest.mark.parametrize("build", OUR_NOISE)
def test_seeded_tokens_are_the_same_on_our_engines(
    build: Callable[[], Engine], started: Started
) -> None:
    request = ask(
        "s", prompt=(11, 45), max_tokens=30, temperature=1.3, seed=9, top_k=40, top_p=0.9,
        min_p=0.01, frequency_penalty=0.5, repetition_penalty=1.1, logit_bias=((19, 2.0),),
    )  # fmt: skip
    assert run(started(build), request)["s"] == reference(request.prompt_ids, request.sampling)


def test_log_probabilities_are_the_models(model_engine: Engine) -> None:
    import torch

    prompt, engine = (5, 6, 7), model_engine
    engine.add(ask("l", prompt=prompt, max_tokens=8, num_logprobs=2, logit_bias=((9, 50.0),)))
    found: list[TokenLogprobs] = []
    while len(found) < 8:
        found.extend(entry for output in engine.step() for entry in output.logprobs)
    tokens = torch.tensor([[*prompt, *(entry.token_id for entry in found)]])
    with torch.no_grad():
        expected = tiny_llama(torch)(tokens).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    for entry, logprobs in zip(found, expected, strict=True):
        assert entry.logprob == pytest.approx(float(logprobs[entry.token_id]), abs=1e-3)
        assert [i for i, _ in entry.top] == logprobs.topk(2).indices.tolist()


def test_a_request_that_is_put_back_keeps_its_penalties_and_log_probabilities() -> None:
    """A cache too small for all makes transformers take requests out and begin them anew."""
    import torch

    from serve_apps.llm.continuous_batching import CacheBudget, ContinuousBatchingEngine

    requests = [
        ask(f"r{i}", tuple(range(i + 1, i + 30)), max_tokens=90, num_logprobs=1,
            repetition_penalty=1.3, frequency_penalty=0.7, temperature=0.8, seed=i)
        for i in range(4)
    ]  # fmt: skip
    roomy = continuous_batching_engine()
    # Eight pages of 32 tokens: two of the four fit in full.
    tight = ContinuousBatchingEngine(tiny_llama(torch), CacheBudget(max_cache_bytes=1))
    try:
        assert run(tight, *requests) == run(roomy, *requests)
    finally:
        roomy.close()
        tight.close()


def test_samples_follow_the_models_probabilities() -> None:
    import torch

    from cluster.sampling import perturb

    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    sampling = Sampling(max_tokens=1, temperature=1.3)
    draws = torch.tensor(
        [int(perturb(logits, sampling, seed=3, position=i).argmax()) for i in range(4000)]
    )
    found = torch.bincount(draws, minlength=4) / 4000
    # Fixed seeds: this passes or fails for good. 0.03 is four standard deviations.
    assert torch.allclose(found, torch.softmax(logits / 1.3, dim=0), atol=0.03)


def test_top_p_keeps_the_fewest_tokens_that_reach_it() -> None:
    import torch

    from cluster.sampling import perturb

    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    sampling = Sampling(max_tokens=1, temperature=1.0, top_p=0.7)
    scores = perturb(logits, sampling, seed=1, position=1)
    assert torch.isfinite(scores).tolist() == [True, True, False, False]


def test_min_p_keeps_what_is_likely_enough_beside_the_best() -> None:
    import torch

    from cluster.logits import adjust

    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    for temperature, kept in ((1.0, [True, True, True, False]), (0.5, [True, True, False, False])):
        sampling = Sampling(max_tokens=1, temperature=temperature, min_p=0.25)
        assert torch.isfinite(adjust(logits, sampling, [], [])).tolist() == kept


def test_penalties_and_biases_are_what_they_are_said_to_be() -> None:
    import torch

    from cluster.logits import adjust

    logits = torch.tensor([2.0, -1.0, 3.0, 0.5])
    sampling = Sampling(
        max_tokens=1, frequency_penalty=0.5, presence_penalty=0.25, repetition_penalty=2.0,
        logit_bias=((3, 1.5),),
    )  # fmt: skip
    found = adjust(logits, sampling, [0], [1, 1])
    # 0 is in the prompt alone: no penalty but that of repetition. 1 was said twice.
    assert found.tolist() == [1.0, -2.0 - 0.25 - 2 * 0.5, 3.0, 2.0]
    assert logits.tolist() == [2.0, -1.0, 3.0, 0.5]


def test_a_broken_engine_says_so_instead_of_hanging() -> None:
    import torch

    from serve_apps.llm.continuous_batching import ContinuousBatchingEngine

    model = tiny_llama(torch)
    engine = ContinuousBatchingEngine(model)

    def explode(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    model.forward = explode
    engine.add(ask("doomed"))
    outputs: list[TokenOutput] = []
    while not outputs:
        outputs.extend(engine.step())
    with pytest.raises(UpstreamFailedError, match="out of memory"):
        engine.step()
    assert [output.finish_reason for output in outputs] == ["error"]
    with pytest.raises(UpstreamFailedError, match="the engine stopped"):
        engine.add(ask("later"))
    engine.close()


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 1.1, "seed": 4}, {"frequency_penalty": 1.5, "repetition_penalty": 1.2}],
)
def test_an_answer_goes_on_where_another_replica_left_it(
    engine: Engine, options: dict[str, Any]
) -> None:
    whole = run(engine, ask("w", max_tokens=16, num_logprobs=1, **options))["w"]
    for given in (1, 9, 15):
        request = ask("c", max_tokens=16, num_logprobs=1, **options)
        request = replace(request, answer_ids=tuple(whole[:given]))
        assert run_with_reasons(engine, request)["c"] == (whole[given:], "length")


@pytest.mark.parametrize("answer", [(1, VOCAB_SIZE), (1,) * 12])
def test_an_answer_that_cannot_go_on_is_refused(engine: Engine, answer: tuple[int, ...]) -> None:
    with pytest.raises(InputError) as caught:
        engine.add(replace(ask("x"), answer_ids=answer))
    assert caught.value.param == "answer_ids"


@pytest.mark.parametrize("build", [e for e in MODEL_ENGINES if e is not continuous_batching_engine])
def test_adapters_answer_beside_their_model(
    build: Callable[[], Engine], started: Started, tmp_path: Path
) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer, models

    engine = started(build)
    assert isinstance(engine, AdapterLoader)
    requests, expected = [ask("model")], {"model": reference((5, 6, 7), ask("model").sampling)}
    for name, rank in (("a", 2), ("b", 4)):
        torch.manual_seed(rank)
        config = LoraConfig(
            task_type="CAUSAL_LM", r=rank, lora_alpha=4 * rank, init_lora_weights=False,
            target_modules=["q_proj", "down_proj"],
        )  # fmt: skip
        adapted = get_peft_model(tiny_llama(torch), config)
        adapted.save_pretrained(tmp_path / name)
        Tokenizer(models.BPE()).save(str(tmp_path / name / "tokenizer.json"))
        engine.load_adapter(name, tmp_path / name)
        requests.append(replace(ask(name), adapter=name))
        model = adapted.merge_and_unload()
        expected[name] = reference((5, 6, 7), ask(name).sampling, model)
    assert len({*map(tuple, expected.values())}) == 3
    assert run(engine, *requests) == expected
    engine.unload_adapter("a")
    with pytest.raises(NotFoundError, match="adapter a is not loaded"):
        engine.add(requests[1])
    assert run(engine, requests[0], requests[2]) == {k: expected[k] for k in ("model", "b")}


def native_talker(model_dir: Path) -> Engine:
    from cluster.grammars import Grammars
    from serve_apps.llm.budget import CacheBudget
    from serve_apps.llm.native.engine import NativeEngine
    from serve_apps.llm.native.model import NativeModel

    budget = CacheBudget(max_cache_bytes=2**21, max_running=8)
    grammars = Grammars.load(model_dir, vocab_size=257, eos_token_ids=(0,))
    return NativeEngine(NativeModel.load(model_dir, budget), budget, grammars)


def vllm_talker(model_dir: Path) -> Engine:
    from serve_apps.llm.vllm import VllmEngine
    from serve_apps.vllm_arguments import VllmArguments

    eager = VllmArguments(enforce_eager=True)
    return VllmEngine.load(model_dir, eager, dtype="float32", max_cache_bytes=2**24, max_running=8)


TALKERS = [native_talker, *([vllm_talker] if vllm_engine in MODEL_ENGINES else [])]


@pytest.mark.parametrize("build", TALKERS)
def test_answers_end_with_their_grammars(build: Callable[[Path], Engine], tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    from tests.tiny_models import save_llama

    shape = {"head_dim": 32, "max_position_embeddings": 512}
    text = Tokenizer.from_file(
        str(save_llama(tmp_path / "talker", "the sun", **shape) / "tokenizer.json")
    )
    schema = {
        "type": "object",
        "properties": {
            "kind": {"enum": ["sun", "moon"]},
            # A key that vLLM's own choice would turn to another library for, too late.
            "height": {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 90},
        },
        "required": ["kind", "height"],
        "additionalProperties": False,
    }
    engine = build(tmp_path / "talker")
    try:
        for ends in ((0,), (200,)):  # its tokenizer's, and an adapter's of its own
            options = {"temperature": 1.0, "seed": 3, "eos_token_ids": ends, "max_tokens": 400}
            first = ask("regex", grammar=Grammar("regex", "(sun|moon){2}"), **options)
            tokens, reason = run_with_reasons(engine, first)["regex"]
            assert (reason, text.decode(tokens[:-1])) in [
                ("stop", one + other) for one in ("sun", "moon") for other in ("sun", "moon")
            ]
            second = ask("schema", grammar=Grammar("json_schema", json.dumps(schema)), **options)
            tokens, reason = run_with_reasons(engine, second)["schema"]
            found = json.loads(text.decode(tokens[:-1]))
            assert (reason, found["height"] % 5, found.keys()) == ("stop", 0, {"kind", "height"})
    finally:
        engine.close()
