"""What a grammar allows, whatever a model would rather say; and that none of them does harm."""

from __future__ import annotations

import contextlib
import json
import random
import re
import time
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from cluster.errors import InputError
from cluster.generation import Grammar, Sampling
from cluster.grammars import Grammars, check_grammar

EOS, SPECIAL = 0, 1


def tokenizer() -> Tokenizer:
    """A byte-level BPE with tokens of several characters, some of them with quotes."""
    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    built.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|end|>", "<|user|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    text = '{"name": "sun", "age": 12, "tags": ["a", "b"]}, 定日镜 true false null'
    built.train_from_iterator([text] * 5, trainer)
    return built


TOKENIZER = tokenizer()
VOCAB_SIZE = TOKENIZER.get_vocab_size() + 7
"""A model's is often padded."""
GRAMMARS = Grammars(TOKENIZER.to_str(), vocab_size=VOCAB_SIZE, eos_token_ids=(EOS,))


def schema(**values: Any) -> Grammar:
    return Grammar("json_schema", json.dumps(values))


def answer(grammar: Grammar, seed: int, max_tokens: int = 400) -> str | None:
    """Any tokens that are allowed, all equally likely; None where it did not end."""
    state, drawn, ids = GRAMMARS.begin(grammar), random.Random(seed), []
    for _ in range(max_tokens):
        token = drawn.choice(np.flatnonzero(state.allowed_after(ids)).tolist())
        if token == EOS:
            return str(TOKENIZER.decode(ids))
        ids.append(token)
    return None


@pytest.mark.parametrize(
    "pattern",
    [
        "[a-z]{3}",
        "(yes|no|定日镜)",
        r"\d{4}-\d{2}-\d{2}",
        "a/b\\\\c",
        "",
        " x",
        "a\nb|a b",
        "^abc$",
        'a/\nb: "c"',
        r"(?i)ab\w\s",
    ],
)
def test_an_answer_matches_its_regular_expression(pattern: str) -> None:
    for seed in range(10):
        text = answer(Grammar("regex", pattern), seed)
        assert text is not None
        assert re.fullmatch(pattern, text), text


def test_the_end_is_allowed_only_where_the_grammar_may_end() -> None:
    state = GRAMMARS.begin(Grammar("regex", "ab?"))
    a, b = (TOKENIZER.token_to_id(letter) for letter in "ab")
    assert np.flatnonzero(state.allowed_after([])).tolist() == [a]
    assert {*np.flatnonzero(state.allowed_after([a]))} == {EOS, b}
    assert np.flatnonzero(state.allowed_after([a, b])).tolist() == [EOS]


def test_no_text_is_a_special_token() -> None:
    state = GRAMMARS.begin(Grammar("regex", ".*<\\|user\\|>"))
    assert not state.allowed_after([])[SPECIAL]


def test_a_state_is_taken_up_again_from_the_answer_so_far() -> None:
    grammar = schema(type="array", items={"type": "boolean"}, minItems=3)
    ids = TOKENIZER.encode("[true, fal").ids
    stepwise, at_once = GRAMMARS.begin(grammar), GRAMMARS.begin(grammar)
    for length in range(len(ids)):
        stepwise.allowed_after(ids[:length])
    assert (stepwise.allowed_after(ids) == at_once.allowed_after(ids)).all()
    found = np.flatnonzero(at_once.allowed_after(ids)).tolist()
    assert {TOKENIZER.decode([token]) for token in found} == {"s", "se "}


def test_white_space_cannot_go_on_for_ever() -> None:
    state = GRAMMARS.begin(schema(type="object"))
    brace, space = (TOKENIZER.token_to_id(letter) for letter in "{Ġ")
    assert state.allowed_after([brace])[space]
    assert not state.allowed_after([brace, space])[space]


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        (Grammar("regex", "(a"), "unclosed group"),
        (Grammar("regex", "a\\"), "escape"),
        (Grammar("regex", "(?=a)b"), "look-around"),
        (Grammar("regex", r"(a)\1"), "backreferences are not supported"),
        (Grammar("regex", "[^\\x00-\\U0010FFFF]"), "no text satisfies it"),
        (Grammar("regex", "a" * 9000), "9000 characters, at most 8192"),
        (Grammar("json_schema", "{"), "it is not JSON"),
        (Grammar("json_schema", "[" * 30_000), "it is not JSON"),
        (Grammar("json_schema", "true"), "no JSON object"),
        (Grammar("json_schema", " " * 70_000), "at most 32768"),
        (Grammar("json_schema", '{"minimum": NaN}'), "expected value"),
        (Grammar("json_schema", '{"items": ' * 200 + "{}" + "}" * 200), "recursion limit"),
        (schema(type="objet"), "objet"),
        (schema(multipleOf=999983), "least common multiple"),
        (schema(allOf=[{"multipleOf": 101}, {"multipleOf": 103}]), "least common multiple"),
        (Grammar("json_schema", '{"multipleOf": 1e-300}'), "least common multiple"),
        (schema(type="integer", minimum=3, maximum=1), "greater than maximum"),
        (schema(type="array", uniqueItems=True), "uniqueItems"),
        (schema(**{"$ref": "#/$defs/none"}), "does not exist"),
        (schema(**{"$ref": "http://127.0.0.1:9/schema"}), "not present"),
        (schema(**{"$ref": "#"}), "no text satisfies it"),
        (schema(**{"x-guidance": {"lenient": True}}), "x-guidance"),
        (schema(enum=[f"{i}" * 3 for i in range(9000)]), "characters, at most"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(grammar: Grammar, words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)) as caught:
        check_grammar(grammar)
    assert caught.value.param == grammar.kind
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 400


HOSTILE = [
    Grammar("regex", "(((a{1000}){1000}){1000})"),
    Grammar("regex", "[ab]*a[ab]{2000}"),
    Grammar("regex", "(.*(a|b).{30}(c|d).{40}){50}"),
    Grammar("regex", "(a?){500}a{500}"),
    Grammar("regex", "(" * 4000 + ")" * 4000),
    schema(type="string", minLength=10**9),
    schema(type="array", items={"type": "string", "pattern": "(.*x){9}"}, minItems=10**9),
    schema(enum=[str(i) for i in range(3000)]),
    schema(properties={f"p{i}": {} for i in range(1500)}),
    schema(anyOf=[{"multipleOf": 9973, "minimum": i} for i in range(500)]),
    schema(anyOf=[{"properties": {f"{i}_{j}": {} for i in range(9)}} for j in range(90)]),
    schema(allOf=[{"anyOf": [{"pattern": f"{i}.*{j}"} for i in range(10)]} for j in range(20)]),
    schema(
        **{"$ref": "#/$defs/0"},
        **{"$defs": {str(i): {"prefixItems": [{"$ref": f"#/$defs/{i + 1}"}] * 9} for i in range(30)}
           | {"30": {}}},
    ),
]  # fmt: skip


@pytest.mark.parametrize("grammar", HOSTILE, ids=range(len(HOSTILE)))
def test_no_grammar_takes_long(grammar: Grammar) -> None:
    """Refused at once, or on the way, or followed; each within limits, however slow the machine."""
    started_s = time.process_time()
    with contextlib.suppress(InputError):
        check_grammar(grammar)
        answer(grammar, seed=1, max_tokens=30)
    # Far above what the limits allow, far below what goes on for ever.
    assert time.process_time() - started_s < 10


def test_a_model_without_an_end_of_sequence_token_has_no_grammars() -> None:
    grammars = Grammars(TOKENIZER.to_str(), vocab_size=VOCAB_SIZE, eos_token_ids=())
    with pytest.raises(InputError, match="no end-of-sequence token"):
        grammars.begin(Grammar("regex", "a"))


def test_a_tokenizer_that_is_not_understood_is_no_obstacle_to_other_requests() -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).to_str()
    grammars = Grammars(words, vocab_size=2, eos_token_ids=(0,))
    with pytest.raises(InputError, match="its tokenizer is not understood"):
        grammars.begin(Grammar("regex", "a"))


def test_the_cuts_are_among_what_is_allowed() -> None:
    import torch

    from cluster.logits import adjust
    from cluster.sampling import perturb

    logits = torch.tensor([0.6, 0.2, 0.15, 0.05]).log()
    allowed = np.array([False, True, True, False])
    sampling = Sampling(1, temperature=1.0, min_p=0.9, top_k=1, grammar=Grammar("regex", "a"))
    scores = perturb(adjust(logits, sampling, [], [], allowed), sampling, seed=1, position=0)
    assert torch.isfinite(scores).tolist() == [False, True, False, False]


def test_an_adapter_ends_its_answers_in_its_own_way() -> None:
    state = GRAMMARS.begin(Grammar("regex", "a?"), eos_token_ids=(SPECIAL,))
    (a,) = TOKENIZER.encode("a").ids
    assert {*np.flatnonzero(state.allowed_after([]))} == {a, SPECIAL}
    assert {*np.flatnonzero(state.allowed_after([a]))} == {SPECIAL}
    begun = GRAMMARS.begin(Grammar("regex", "ab"), eos_token_ids=(SPECIAL,))
    assert not begun.allowed_after([a])[[EOS, SPECIAL]].any()
