"""Holding an answer to a JSON schema or a regular expression: which tokens it allows next.

The grammars are llguidance's, which works on them as far as it must and within limits, so that
no schema takes long to compile or a token long to find; knows nothing of logits or requests.

    check_grammar(Grammar("json_schema", '{"type": "integer"}'))
    grammars = Grammars.load(package.model_dir, vocab_size=8192, eos_token_ids=(0,))
    state = grammars.begin(Grammar("regex", "[a-z]{3}"))
    allowed_V = state.allowed_after(answer_ids)
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, regex_to_lark

from cluster.errors import InputError, PackageError
from cluster.generation import Grammar
from cluster.processing import Array

MAX_SCHEMA_CHARACTERS = 32 * 1024
MAX_REGEX_CHARACTERS = 8 * 1024
_MAX_CHECKED = 256
_MAX_COMPILED = 64
_MAX_SHOWN = 300
_ENDS_IN_ESCAPE = re.compile(r"(?<!\\)(?:\\\\)*\\\Z")
_MAX_COMMON_MULTIPLE = 10_000
_MAX_DECIMALS = 12
_OPTIONS_KEY = "x-guidance"
"""In a schema it would change how llguidance reads it."""

# Sources written to hurt took 0.4 s at most to compile (thousands of optional properties) and 95 ms
# for a token's mask; a common schema 1 ms and 0.1 ms (2 CPU cores, vocabulary of 128,000).
_LIMITS = LLParserLimits(
    initial_lexer_fuel=200_000,
    step_lexer_fuel=100_000,
    step_max_items=20_000,
    max_lexer_states=10_000,
    max_grammar_size=20_000,
    verbose_errors=False,
)
_JSON_STYLE: Any = {
    # Compact, with spaces, or indented; but a model that knows no better cannot go on with white
    # space for ever.
    "whitespace_flexible": True,
    "whitespace_pattern": r" |\n {0,24}",
    "item_separator": ",",
    "key_separator": ":",
    "lenient": False,
    "coerce_one_of": False,
}


class GrammarState:
    """One answer's place in its grammar."""

    def __init__(
        self,
        grammar: Grammar,
        matcher: LLMatcher,
        vocab_size: int,
        ends: tuple[list[int], list[int]] = ([], []),
    ) -> None:
        """`ends`: tokens that end a text to the matcher, and those that are to stand for them."""
        self._grammar = grammar
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._num_taken = 0
        self._ends = ends

    def allowed_after(self, answer_ids: Sequence[int]) -> Array:
        """For each token whether it may follow; an answer is only ever longer than the last time.

        Raises:
            InputError: nothing may follow, or what may is too hard to find.
        """
        self._matcher.consume_tokens(list(answer_ids[self._num_taken :]))
        self._num_taken = len(answer_ids)
        mask = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise _refusal(self._grammar, _first_line(self._matcher.get_error()))
        bits = np.frombuffer(mask, dtype=np.uint8)
        allowed_V = np.unpackbits(bits, bitorder="little", count=self._vocab_size)  # noqa: N806
        own, others = self._ends
        if others:
            may_end = allowed_V[own].any()
            allowed_V[own] = False
            allowed_V[others] = may_end
        if not allowed_V.any():
            raise _refusal(self._grammar, "the model has no token to go on with")
        return allowed_V.view(np.bool_)


class Grammars:
    """Grammars over one model's tokens; the last ones used stay compiled."""

    def __init__(
        self, tokenizer_json: str, *, vocab_size: int, eos_token_ids: Sequence[int]
    ) -> None:
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._tokenizer: LLTokenizer | None = None
        self._reason = "the model has no end-of-sequence token"
        if eos_token_ids:
            try:
                self._tokenizer = LLTokenizer(
                    tokenizer_json, n_vocab=vocab_size, eos_token=list(eos_token_ids)
                )
            except ValueError as error:
                self._reason = f"its tokenizer is not understood: {_first_line(str(error))}"
        self._compiled = functools.lru_cache(maxsize=_MAX_COMPILED)(self._compile)

    @classmethod
    def load(cls, model_dir: Path, *, vocab_size: int, eos_token_ids: Sequence[int]) -> Grammars:
        """For the tokenizer of a verified Hugging Face directory (0.5 s for 128,000 tokens)."""
        path = model_dir / "tokenizer.json"
        if not path.is_file():
            raise PackageError(
                "the model has no tokenizer.json, which serving needs",
                hint="save it with tokenizer.save_pretrained(DIR) of a fast tokenizer",
            )
        source = path.read_text(encoding="utf-8")
        return cls(source, vocab_size=vocab_size, eos_token_ids=eos_token_ids)

    def begin(self, grammar: Grammar, eos_token_ids: Sequence[int] = ()) -> GrammarState:
        """The state before an answer's first token.

        Args:
            eos_token_ids: what ends this answer, where an adapter ends it otherwise than its base.

        Raises:
            InputError: the grammar is wrong, or the model's tokens cannot be held to any.
        """
        matcher, own = self._compiled(grammar).deep_copy(), self._eos_token_ids
        others = [] if {*eos_token_ids} == {*own} else list(eos_token_ids)
        return GrammarState(grammar, matcher, self._vocab_size, (own, others))

    def _compile(self, grammar: Grammar) -> LLMatcher:
        if self._tokenizer is None:
            raise InputError(
                f"this model's answers cannot be held to a grammar: {self._reason}",
                param=grammar.kind,
            )
        return _compile(grammar, self._tokenizer)


@functools.lru_cache(maxsize=_MAX_CHECKED)
def check_grammar(grammar: Grammar) -> None:
    """Raises InputError, `param` being its kind, for one that is wrong, unsupported or too complex.

    It does so for any model's tokenizer: over bytes, which all of them are made of.
    """
    matcher = _compile(grammar, _bytes())
    GrammarState(grammar, matcher, _bytes().vocab_size).allowed_after(())


def _compile(grammar: Grammar, tokenizer: LLTokenizer) -> LLMatcher:
    _check_size(grammar)
    if grammar.kind == "regex":
        if _ENDS_IN_ESCAPE.search(grammar.source):  # which llguidance would drop
            raise _refusal(grammar, "it ends in the middle of an escape")
        # \d, \w and \s are ASCII's, as schemas have them too.
        pattern = regex_to_lark(grammar.source, "dws")
        source = LLMatcher.grammar_from_lark(f"start: /{pattern}/")
    else:
        _check_schema(grammar)
        try:
            source = LLMatcher.grammar_from_json_schema(grammar.source, overrides=_JSON_STYLE)
        except ValueError as error:  # what Python's reader takes and llguidance's does not
            raise _refusal(grammar, _first_line(str(error))) from None
    matcher = LLMatcher(tokenizer, source, log_level=0, limits=_LIMITS)
    if matcher.is_error():
        raise _refusal(grammar, _first_line(matcher.get_error()))
    return matcher


@functools.cache
def _bytes() -> LLTokenizer:
    return LLTokenizer("byte")


def _check_size(grammar: Grammar) -> None:
    limit = MAX_REGEX_CHARACTERS if grammar.kind == "regex" else MAX_SCHEMA_CHARACTERS
    if len(grammar.source) > limit:
        raise _refusal(
            grammar, f"it has {len(grammar.source)} characters, at most {limit} are allowed"
        )


def _check_schema(grammar: Grammar) -> None:
    try:
        schema = json.loads(grammar.source, parse_float=Decimal)
    except (ValueError, RecursionError) as error:
        raise _refusal(grammar, f"it is not JSON: {_first_line(str(error))}") from None
    if not isinstance(schema, dict):
        raise _refusal(grammar, "it is no JSON object")
    if _OPTIONS_KEY in schema:
        raise _refusal(grammar, f"key '{_OPTIONS_KEY}' is not supported")
    if _common_multiple(schema) > _MAX_COMMON_MULTIPLE:
        raise _refusal(
            grammar,
            "the least common multiple of its multipleOf, without their decimal point, is more "
            f"than {_MAX_COMMON_MULTIPLE}",
        )


def _common_multiple(schema: Any) -> int:
    """Of every multipleOf, which llguidance counts up to where several hold for one number."""
    found: set[Decimal] = set()
    pending = [schema]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            multiple = value.get("multipleOf")
            if isinstance(multiple, int | Decimal):
                found.add(Decimal(multiple))
            pending.extend(value.values())
        elif isinstance(value, list):
            pending.extend(value)
    digits = max((-int(each.as_tuple().exponent) for each in found), default=0)
    if digits > _MAX_DECIMALS or any(abs(each) > _MAX_COMMON_MULTIPLE for each in found):
        return _MAX_COMMON_MULTIPLE + 1
    return math.lcm(*(int(each.scaleb(max(0, digits))) for each in found))


def _refusal(grammar: Grammar, reason: str) -> InputError:
    name = "regular expression" if grammar.kind == "regex" else "schema"
    return InputError(f"the {name} is refused: {reason}", param=grammar.kind)


def _first_line(message: str) -> str:
    """What llguidance says is wrong, without the place in its own form of the grammar."""
    found = re.search(r"^error: (.+)$", message, re.MULTILINE)
    line = found[1] if found else message.strip().splitlines()[0]
    if line.startswith("NoExtension"):
        line = "no text satisfies it"
    return line[:_MAX_SHOWN]
