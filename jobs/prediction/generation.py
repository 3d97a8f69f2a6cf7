"""Continuing prompts together, each with its own sampling, seed, length and stop strings.

transformers' `generate` runs the model and keeps its cache; the choice of each token is serving's
(`cluster.sampling`), made an argmax by noise that depends on nothing but the row's seed and the
token's position. It knows nothing of rows.

    generate(model, [Prompt((1, 2, 3), Sampling(max_tokens=8))], text.detokenizer)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from cluster.errors import InputError
from cluster.generation import Sampling
from cluster.grammars import GrammarState
from cluster.logits import adjust
from cluster.processing import Array
from cluster.processing.text import IncrementalDetokenizer, StopStrings
from cluster.sampling import perturb


@dataclass(frozen=True)
class Prompt:
    """What is to be continued, and how."""

    token_ids: tuple[int, ...]
    sampling: Sampling
    seed: int = 0
    stops: tuple[str, ...] = ()
    grammar: GrammarState | None = None
    """The beginning of the sampling's grammar, if it has one."""

    def allowed_after(self, answer_ids: Sequence[int]) -> Array | None:
        """What its grammar allows next; None where it has none."""
        return None if self.grammar is None else self.grammar.allowed_after(answer_ids)


class Continuation:
    """A text while it grows."""

    def __init__(self, prompt: Prompt, detokenizer: IncrementalDetokenizer) -> None:
        self._sampling = prompt.sampling
        self._detokenizer = detokenizer
        self._stops = StopStrings(prompt.stops)
        self.text = ""
        self.token_ids: list[int] = []
        """The end token included."""
        self.finish_reason = ""
        """'stop' or 'length' once it has ended, or 'refused'."""
        self.refusal: InputError | None = None
        """Why its grammar could not be followed to the end."""

    def push(self, token: int) -> bool:
        """Take a token; whether that was the last one."""
        if self.finish_reason:
            return True
        self.token_ids.append(token)
        is_end = token in self._sampling.eos_token_ids
        self.text += self._stops.push("" if is_end else self._detokenizer.push([token]))
        if self._stops.matched is not None:
            self.finish_reason = "stop"
        elif is_end or len(self.token_ids) >= self._sampling.max_tokens:
            self.finish_reason = "stop" if is_end else "length"
            self._finish()
        return bool(self.finish_reason)

    def refuse(self, reason: InputError) -> None:
        self.finish_reason, self.refusal = "refused", reason

    def _finish(self) -> None:
        self.text += self._stops.push(self._detokenizer.flush())
        if self._stops.matched is not None:
            self.finish_reason = "stop"
        else:
            self.text += self._stops.flush()


@torch.inference_mode()
def generate(
    model: Any,
    prompts: Sequence[Prompt],
    detokenizer: Callable[[], IncrementalDetokenizer],
) -> list[Continuation]:
    """Continue every prompt until it ends."""
    found = [Continuation(prompt, detokenizer()) for prompt in prompts]
    if not prompts:
        return found
    width = max(len(prompt.token_ids) for prompt in prompts)
    ids = [[0] * (width - len(p.token_ids)) + list(p.token_ids) for p in prompts]
    mask = [[0] * (width - len(p.token_ids)) + [1] * len(p.token_ids) for p in prompts]
    # Else the model's own file adds temperatures and penalties, which serving knows nothing of.
    model.generation_config = GenerationConfig()
    model.generate(
        torch.tensor(ids, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        generation_config=GenerationConfig(
            max_new_tokens=max(prompt.sampling.max_tokens for prompt in prompts),
            do_sample=False,
            pad_token_id=0,
        ),
        logits_processor=[_Draws(prompts, found)],
        stopping_criteria=[_Ends(found)],
    )
    return found


class _Draws(LogitsProcessor):  # type: ignore[misc]
    """Makes the argmax choose what each prompt's sampling would."""

    def __init__(self, prompts: Sequence[Prompt], found: Sequence[Continuation]) -> None:
        self._prompts = prompts
        self._found = found

    def __call__(self, _ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for row, (prompt, found) in enumerate(zip(self._prompts, self._found, strict=True)):
            if found.finish_reason:
                continue
            position = len(prompt.token_ids) + len(found.token_ids)
            try:
                allowed = prompt.allowed_after(found.token_ids)
            except InputError as error:
                found.refuse(error)
                continue
            logits = adjust(
                scores[row], prompt.sampling, prompt.token_ids, found.token_ids, allowed
            )
            scores[row] = perturb(logits, prompt.sampling, seed=prompt.seed, position=position)
        return scores


class _Ends(StoppingCriteria):  # type: ignore[misc]
    """Hands each new token over, and tells which rows have ended."""

    def __init__(self, found: Sequence[Continuation]) -> None:
        self._found = found

    def __call__(self, ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        tokens = ids[:, -1].tolist()
        ended = [found.push(token) for found, token in zip(self._found, tokens, strict=True)]
        return torch.tensor(ended, device=ids.device)
