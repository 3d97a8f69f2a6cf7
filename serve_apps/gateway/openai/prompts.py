"""From the prompts and messages of a request to requests for the engine, within the limits.

Nothing is tokenised that could not fit: a text is measured in characters first.

    answers = begin_completion(models, model, asked, limits)
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Sequence

from cluster.errors import InputError
from cluster.processing.text import TextProcessor
from serve_apps.gateway.catalogue import ServedModel
from serve_apps.gateway.models import Models
from serve_apps.gateway.openai.schema import (
    ChatRequest,
    CompletionRequest,
    Generation,
    TextLimits,
)
from serve_apps.gateway.openai.text_generation import TextAnswer, TextAnswers
from serve_apps.llm.engine import EngineRequest, Sampling, check_request

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default."""
_DEFAULT_CHAT_TOKENS = 1024


def begin_completion(
    models: Models, model: ServedModel, asked: CompletionRequest, limits: TextLimits
) -> TextAnswers:
    """Answers that generate nothing until they are read.

    Raises:
        InputError: `param` names what the model, or a limit, forbids.
    """
    model.require_text()
    asked.check()
    prompts = asked.prompts
    check_num_choices(asked, len(prompts), limits)
    encoded = [_encode_prompt(model, prompt, limits) for prompt in prompts]
    return _begin(
        models, model, asked, encoded, limits, asked.max_tokens, DEFAULT_COMPLETION_TOKENS
    )


def begin_chat(
    models: Models, model: ServedModel, asked: ChatRequest, limits: TextLimits
) -> TextAnswers:
    """As `begin_completion`, for messages."""
    text, info = model.require_text()
    asked.check()
    check_num_choices(asked, 1, limits)
    num_characters = sum(len(message.text) for message in asked.messages)
    check_length(num_characters, text, info.max_context_tokens, limits, param="messages")
    prompt_ids = text.encode_chat([message.for_template() for message in asked.messages])
    max_tokens = asked.max_completion_tokens or asked.max_tokens
    try:
        return _begin(models, model, asked, [prompt_ids], limits, max_tokens, _DEFAULT_CHAT_TOKENS)
    except InputError as error:
        error.param = asked.field_of(error.param)
        raise


def echo_of(asked: CompletionRequest, model: ServedModel) -> list[str]:
    """The prompt of each answer as text, where it is to be echoed."""
    if not asked.echo:
        return []
    text, _ = model.require_text()
    shown = [p if isinstance(p, str) else text.decode(p) for p in asked.prompts]
    return [prompt for prompt in shown for _ in range(asked.num_choices)]


def check_length(
    num_characters: int, text: TextProcessor, max_tokens: int, limits: TextLimits, *, param: str
) -> None:
    """Raises InputError for a text that is too long for a model, before it is tokenised."""
    limit = min(limits.max_prompt_characters, max_tokens * text.longest_token)
    if num_characters > limit:
        raise InputError(
            f"parameter '{param}' has {num_characters} characters, at most {limit} are allowed "
            f"for this model, which holds {max_tokens} tokens",
            hint="shorten it",
            param=param,
        )


def check_max_tokens(max_tokens: int | None, limits: TextLimits) -> None:
    """Raises InputError for more tokens than one answer may have."""
    if max_tokens is not None and max_tokens > limits.max_completion_tokens:
        raise InputError(
            f"max_tokens is {max_tokens}, at most {limits.max_completion_tokens} are allowed",
            param="max_tokens",
        )


def check_num_choices(asked: Generation, num_prompts: int, limits: TextLimits) -> None:
    """Raises InputError for no prompt, or for more answers than one request may have."""
    if num_prompts == 0:
        raise InputError(
            "parameter 'prompt' is empty", hint="send at least one prompt", param="prompt"
        )
    total = num_prompts * asked.num_choices
    if total > limits.max_choices:
        raise InputError(
            f"{num_prompts} prompts with n {asked.num_choices} make {total} answers, at most "
            f"{limits.max_choices} are allowed in one request",
            hint="send several requests",
            param="prompt" if asked.num_choices == 1 else "n",
        )


def _encode_prompt(model: ServedModel, prompt: str | list[int], limits: TextLimits) -> list[int]:
    text, info = model.require_text()
    if isinstance(prompt, str):
        check_length(len(prompt), text, info.max_context_tokens, limits, param="prompt")
        prompt = text.encode(prompt)
    if not prompt:
        raise InputError(
            "parameter 'prompt' is empty, and this model has no beginning-of-text token",
            hint="send at least one character",
            param="prompt",
        )
    return prompt


def _begin(
    models: Models,
    model: ServedModel,
    asked: Generation,
    prompts: Sequence[list[int]],
    limits: TextLimits,
    max_tokens: int | None,
    default_tokens: int,
) -> TextAnswers:
    _, info = model.require_text()
    check_max_tokens(max_tokens, limits)
    answers: list[TextAnswer] = []
    for prompt_ids in prompts:
        room = info.max_context_tokens - len(prompt_ids)
        default = max(1, min(room, default_tokens, limits.max_completion_tokens))
        for index in range(asked.num_choices):
            sampling = _sampling(asked, max_tokens or default, index, info.eos_token_ids)
            # The engine's request id is ours: a client's may not be unique.
            request = EngineRequest(uuid.uuid4().hex, tuple(prompt_ids), sampling)
            check_request(
                request, max_context_tokens=info.max_context_tokens, vocab_size=info.vocab_size
            )
            answers.append(
                TextAnswer(models, model, request, stops=asked.stops, field_of=asked.field_of)
            )
    return TextAnswers(answers, num_per_prompt=asked.num_choices)


def _sampling(
    asked: Generation, max_tokens: int, index: int, eos_token_ids: tuple[int, ...]
) -> Sampling:
    def given(value: float | None, default: float) -> float:
        return default if value is None else value

    biases = asked.logit_bias or {}
    return Sampling(
        max_tokens=max_tokens,
        temperature=given(asked.temperature, 1),
        top_p=given(asked.top_p, 1),
        top_k=max(0, asked.top_k or 0),
        min_p=given(asked.min_p, 0),
        frequency_penalty=given(asked.frequency_penalty, 0),
        presence_penalty=given(asked.presence_penalty, 0),
        repetition_penalty=given(asked.repetition_penalty, 1),
        logit_bias=tuple((int(token), bias) for token, bias in biases.items()),
        num_logprobs=asked.num_logprobs,
        seed=seed_of_choice(asked.seed, index),
        eos_token_ids=eos_token_ids,
        grammar=asked.grammar,
    )


def seed_of_choice(seed: int | None, index: int) -> int | None:
    """The same for every prompt, and for any `n`: the first answer is that of n 1."""
    if seed is None or index == 0:
        return seed
    digest = hashlib.sha256(f"{seed}:{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
