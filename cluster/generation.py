"""How a language model's answer is to be generated: for serving and for offline prediction alike.

Data alone, without torch; `cluster.logits` and `cluster.sampling` carry it out.

    Sampling(max_tokens=64, temperature=0.8, seed=7)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Grammar:
    """What the text of an answer must be; `cluster.grammars` carries it out."""

    kind: Literal["json_schema", "regex"]
    source: str
    """The schema as JSON, or the regular expression that the whole text matches."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and when to stop."""

    max_tokens: int
    temperature: float = 1.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    """Keep the most likely tokens whose probabilities add up to this."""
    top_k: int = 0
    """Keep this many of the most likely tokens; 0 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this probable: a share of the most likely one's probability."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit for each time that the answer has it already."""
    presence_penalty: float = 0.0
    """Taken from the logit of every token that the answer has already."""
    repetition_penalty: float = 1.0
    """Divides positive, and multiplies negative, logits of tokens in the prompt or the answer."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Token ids with what is added to their logits, whatever the penalties made of them."""
    num_logprobs: int | None = None
    """How many of the most likely tokens to report beside each chosen one; None reports nothing."""
    seed: int | None = None
    """The same seed gives the same answer; None draws one."""
    eos_token_ids: tuple[int, ...] = ()
    grammar: Grammar | None = None
    """Only tokens that it allows are chosen; the end of sequence where it is complete."""

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def changes_logits(self) -> bool:
        """Whether they are changed before the temperature counts."""
        return bool(
            self.grammar
            or self.logit_bias
            or self.min_p
            or self.frequency_penalty
            or self.presence_penalty
            or self.repetition_penalty != 1
        )


@dataclass(frozen=True)
class TokenLogprobs:
    """How likely the model found one token: natural logarithms, before temperature, penalties,
    biases and cuts."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The most likely tokens with theirs, best first."""
