"""Answers that are held to a grammar, on each engine that is present."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from cluster.errors import InputError
from cluster.generation import Grammar
from cluster.grammars import Grammars
from serve_apps.llm.engine import Engine, EngineRequest, Sampling, TokenLogprobs, TokenOutput
from serve_apps.llm.fake import FakeEngine
from tests.tiny_models import save_llama

CONTEXT_TOKENS = 1024
LONGEST = 700
SEED = 11


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "talker"
    return save_llama(directory, "the sun", max_position_embeddings=CONTEXT_TOKENS)


def fake_engine(_: Path, grammars: Grammars) -> Engine:
    return FakeEngine(vocab_size=257, max_context_tokens=CONTEXT_TOKENS, grammars=grammars)


def continuous_batching_engine(model_dir: Path, grammars: Grammars) -> Engine:
    from serve_apps.llm.continuous_batching import CacheBudget, ContinuousBatchingEngine

    budget = CacheBudget(max_cache_bytes=2**23, max_running=8, max_batch_tokens=64)
    return ContinuousBatchingEngine.load(model_dir, budget, grammars=grammars)


def native_engine(model_dir: Path, grammars: Grammars) -> Engine:
    from serve_apps.llm.budget import CacheBudget
    from serve_apps.llm.native.engine import NativeEngine
    from serve_apps.llm.native.model import NativeModel

    budget = CacheBudget(max_cache_bytes=2**21, max_running=8, max_batch_tokens=64)
    return NativeEngine(NativeModel.load(model_dir, budget), budget, grammars)


@pytest.fixture(params=[fake_engine, continuous_batching_engine, native_engine], scope="module")
def engine(request: pytest.FixtureRequest, model_dir: Path) -> Iterator[Engine]:
    build: Callable[[Path, Grammars], Engine] = request.param
    engine = build(model_dir, Grammars.load(model_dir, vocab_size=257, eos_token_ids=(0,)))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Any:
    return Tokenizer.from_file(str(model_dir / "tokenizer.json"))


def ask(name: str, grammar: Grammar | None, **sampling: Any) -> EngineRequest:
    values = {"max_tokens": LONGEST, "temperature": 1.0, "seed": SEED, "eos_token_ids": (0,)}
    return EngineRequest(name, (5, 6, 7), Sampling(**values | sampling, grammar=grammar))


def run(engine: Engine, *requests: EngineRequest) -> dict[str, tuple[list[int], TokenOutput]]:
    """Each request's tokens, and its last output."""
    for request in requests:
        engine.add(request)
    tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
    last: dict[str, TokenOutput] = {}
    while len(last) < len(requests):
        for output in engine.step():
            tokens[output.request_id].extend(output.token_ids)
            if output.finish_reason is not None:
                last[output.request_id] = output
    return {name: (tokens[name], last[name]) for name in tokens}


SCALARS = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.lists(st.text(max_size=4) | st.integers(-99, 99), min_size=1, max_size=3).map(
        lambda values: {"enum": values}
    ),
    st.integers(-50, 50).flatmap(
        lambda low: st.integers(low, low + 1000).map(
            lambda high: {"type": "integer", "minimum": low, "maximum": high}
        )
    ),
    st.integers(0, 6).map(lambda most: {"type": "string", "maxLength": most}),
    st.just({"type": "string", "pattern": "^[a-c]{1,3}x?$"}),
    st.just({"type": "string", "format": "date"}),
)


def compound(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    arrays = st.tuples(inner, st.integers(0, 2), st.integers(0, 2)).map(
        lambda v: {"type": "array", "items": v[0], "minItems": v[1], "maxItems": v[1] + v[2]}
    )
    names = st.text(alphabet='ab"\\é日 ', max_size=3)
    objects = st.dictionaries(names, st.tuples(inner, st.booleans()), max_size=3).map(
        lambda found: {
            "type": "object",
            "properties": {name: schema for name, (schema, _) in found.items()},
            "required": [name for name, (_, is_required) in found.items() if is_required],
            "additionalProperties": False,
        }
    )
    return arrays | objects | st.lists(inner, min_size=1, max_size=2).map(lambda v: {"anyOf": v})


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(st.recursive(SCALARS, compound, max_leaves=5), min_size=4, max_size=4))
def test_a_sampled_answer_is_what_its_schema_describes(
    engine: Engine, tokenizer: Any, schemas: list[dict[str, Any]]
) -> None:
    requests = [
        ask(str(number), Grammar("json_schema", json.dumps(schema)), temperature=0.5 + number)
        for number, schema in enumerate(schemas)
    ]
    answers = run(engine, *requests)
    for number, schema in enumerate(schemas):
        tokens, last = answers[str(number)]
        assert last.finish_reason == "stop", (schema, last, tokenizer.decode(tokens))
        value = json.loads(tokenizer.decode(tokens[:-1]))
        jsonschema.validate(value, schema)


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_an_answer_matches_its_expression_beside_one_that_is_free(
    engine: Engine, tokenizer: Any, temperature: float
) -> None:
    pattern = "(日|sun|a{2,4}){3}!"
    held = ask("held", Grammar("regex", pattern), temperature=temperature)
    free = ask("free", None, max_tokens=40)
    together = run(engine, held, free)
    text = tokenizer.decode(together["held"][0])
    assert re.fullmatch(pattern, text), text
    for request in (held, free):
        assert run(engine, request)[request.request_id][0] == together[request.request_id][0]


def test_an_answer_that_is_taken_up_elsewhere_goes_on_in_its_grammar(engine: Engine) -> None:
    held = ask("held", Grammar("json_schema", '{"type": "string", "maxLength": 9}'))
    whole = run(engine, held)["held"][0]
    for length in range(len(whole)):
        begun = dataclasses.replace(held, answer_ids=tuple(whole[:length]))
        assert run(engine, begun)["held"][0] == whole[length:]


def test_a_grammar_that_breaks_down_on_the_way_ends_its_own_answer_alone(engine: Engine) -> None:
    hard = Grammar("regex", "(((a{1000}){1000}){1000})")
    answers = run(engine, ask("hard", hard), ask("free", None, max_tokens=30))
    assert answers["hard"][1].finish_reason == "refused"
    assert "regular expression is refused" in (answers["hard"][1].error or "")
    assert answers["free"][1].finish_reason in ("stop", "length")
    assert engine.stats().num_running == engine.stats().num_waiting == 0


def test_a_wrong_grammar_is_refused_and_takes_no_place(engine: Engine) -> None:
    with pytest.raises(InputError, match="unclosed group") as caught:
        engine.add(ask("wrong", Grammar("regex", "(")))
    assert caught.value.param == "regex"
    assert engine.stats().num_running == engine.stats().num_waiting == 0


def test_an_engine_without_a_tokenizer_says_so() -> None:
    with pytest.raises(InputError, match="cannot hold an answer to a grammar"):
        FakeEngine().add(ask("held", Grammar("regex", "a")))


def test_log_probabilities_are_the_models_whatever_the_grammar_allows(engine: Engine) -> None:
    found: list[TokenLogprobs] = []
    for name, grammar in (("free", None), ("held", Grammar("regex", "z"))):
        engine.add(ask(name, grammar, num_logprobs=3, max_tokens=1))
        while not (outputs := engine.step()):
            pass
        found.extend(outputs[0].logprobs)
    free, held = found
    assert dict(held.top) == pytest.approx(dict(free.top))
    assert held.logprob < 0
