"""From logits to tokens: each sequence by its own sampling, plain greedy ones all at once.

choices = choose(logits, sequences)
"""

from __future__ import annotations

from collections.abc import Sequence as Series
from dataclasses import dataclass

import torch

from cluster.errors import InputError
from cluster.logits import adjust, describe_choice
from cluster.sampling import perturb
from serve_apps.llm.engine import FinishReason, TokenLogprobs
from serve_apps.llm.native.scheduler import Sequence

Failure = tuple[FinishReason, str]
NO_NUMBERS: Failure = ("error", "what the model computed is not numbers")


@dataclass(frozen=True)
class Choice:
    """A sequence's next token."""

    token_id: int
    logprobs: tuple[TokenLogprobs, ...] = ()
    failure: Failure | None = None
    """Why there is none: its grammar cannot be followed any further, or no logit is a number."""


@torch.inference_mode()
def choose(logits: torch.Tensor, sequences: Series[Sequence]) -> list[Choice]:
    """The next token of each sequence, from its row of logits [sequences, vocabulary]."""
    largest = logits.max(dim=-1)  # argmax takes six times as long in bf16
    best, is_broken = largest.indices.tolist(), largest.values.isnan().tolist()
    choices: list[Choice] = []
    for row, sequence in enumerate(sequences):
        if is_broken[row]:
            choices.append(Choice(-1, failure=NO_NUMBERS))
        elif _is_plain(sequence):
            choices.append(Choice(best[row]))
        else:
            choices.append(_choose_one(logits[row], sequence))
    return choices


def _is_plain(sequence: Sequence) -> bool:
    sampling = sequence.request.sampling
    return sampling.is_greedy and not sampling.changes_logits and sampling.num_logprobs is None


def _choose_one(logits: torch.Tensor, sequence: Sequence) -> Choice:
    sampling, tokens = sequence.request.sampling, sequence.tokens
    scores = logits
    if sampling.changes_logits:
        prompt, answer = tokens[: sequence.num_prompt], tokens[sequence.num_prompt :]
        try:
            allowed = None
            if sequence.grammar is not None:
                allowed = sequence.grammar.allowed_after(answer)
        except InputError as error:
            return Choice(-1, failure=("refused", error.message))
        scores = adjust(scores, sampling, prompt, answer, allowed)
    scores = perturb(scores, sampling, seed=sequence.seed, position=len(tokens))
    token = int(scores.argmax())
    if sampling.num_logprobs is None:
        return Choice(token)
    return Choice(token, (describe_choice(logits, token, sampling.num_logprobs),))
