"""Language models: rows become prompts, and what is generated becomes text.

A row has `prompt` (text or token ids) or `messages`, and may have values of its own for all that
`generation` says. Tokenizer, chat template, stop strings and the choice
of tokens are those of serving. It knows nothing of files.

    predictor = TextPredictor(package, model, config)
    predictor.answer(predictor.prepare(rows))
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from pydantic import ValidationError

from cluster.config import first_problem
from cluster.errors import InputError
from cluster.generation import Grammar, Sampling
from cluster.grammars import Grammars
from cluster.model_package import ModelPackage
from cluster.processing.text import TextProcessor
from cluster.sampling import mix
from jobs.prediction.config import MAX_DEFAULT_TOKENS, GenerationConfig, PredictConfig
from jobs.prediction.generation import Continuation, Prompt, generate
from jobs.prediction.predictor import Answer, Prepared
from jobs.prediction.rows import Row, Values

_PROMPT, _MESSAGES = "prompt", "messages"


class TextPredictor:
    """See `jobs.prediction.predictor.Predictor`."""

    def __init__(self, package: ModelPackage, model: Any, config: PredictConfig) -> None:
        info = package.manifest.language_model
        assert info is not None, "a verified package of a language model describes it"
        self._info = info
        self._model_dir = package.model_dir
        self._text = TextProcessor.load(package.model_dir)
        self._defaults = config.generation
        self._columns = config.columns
        known = {_PROMPT, _MESSAGES, *GenerationConfig.model_fields}
        if unknown := sorted(config.columns.keys() - known):
            raise InputError(
                f"a language model has no input '{unknown[0]}'",
                hint=f"it takes {', '.join(sorted(known))}",
                param="columns",
            )
        torch.set_num_threads(config.num_threads)
        self._model = model.to("cuda") if config.num_gpus > 0 else model

    def prepare(self, rows: Sequence[Row]) -> list[Prepared | InputError]:
        return [self._try_prompt(row) for row in rows]

    def answer(self, prepared: Sequence[Prepared]) -> list[Answer | InputError]:
        prompts = [each.work for each in prepared]
        found = generate(self._model, prompts, self._text.detokenizer)
        return [_answer(prompt, text) for prompt, text in zip(prompts, found, strict=True)]

    @functools.cached_property
    def _grammars(self) -> Grammars:
        info = self._info
        return Grammars.load(
            self._model_dir, vocab_size=info.vocab_size, eos_token_ids=info.eos_token_ids
        )

    def _try_prompt(self, row: Row) -> Prepared | InputError:
        try:
            prompt = self._prompt(row)
        except InputError as error:
            return error
        return Prepared(prompt, len(prompt.token_ids) + prompt.sampling.max_tokens)

    def _prompt(self, row: Row) -> Prompt:
        values = {
            name: row.values.get(self._columns.get(name, name))
            for name in (_PROMPT, _MESSAGES, *GenerationConfig.model_fields)
        }
        ids = self._token_ids(values)
        own = {n: v for n, v in values.items() if n in GenerationConfig.model_fields}
        chosen = self._options({name: value for name, value in own.items() if value is not None})
        room = self._info.max_context_tokens - len(ids)
        max_tokens = chosen.max_tokens or max(1, min(room, MAX_DEFAULT_TOKENS))
        if max_tokens > room:
            raise InputError(
                f"{len(ids)} prompt tokens and max_tokens {max_tokens} make "
                f"{len(ids) + max_tokens}, but the model holds {self._info.max_context_tokens}",
                hint="shorten the prompt or lower max_tokens",
                param="max_tokens" if room > 0 else _PROMPT,
            )
        seed = chosen.seed if own["seed"] is not None else mix(chosen.seed, row.number)
        sampling = Sampling(
            max_tokens=max_tokens,
            temperature=chosen.temperature,
            top_p=chosen.top_p,
            top_k=chosen.top_k,
            min_p=chosen.min_p,
            frequency_penalty=chosen.frequency_penalty,
            presence_penalty=chosen.presence_penalty,
            repetition_penalty=chosen.repetition_penalty,
            logit_bias=tuple(chosen.logit_bias.items()),
            eos_token_ids=self._info.eos_token_ids,
            grammar=_grammar_of(chosen),
        )
        self._check_ids(chosen.logit_bias, "logit_bias")
        held = None if sampling.grammar is None else self._grammars.begin(sampling.grammar)
        return Prompt(tuple(ids), sampling, seed, chosen.stop, held)

    def _token_ids(self, values: Values) -> list[int]:
        prompt, messages = values[_PROMPT], values[_MESSAGES]
        if (prompt is None) == (messages is None):
            raise InputError(
                "the row has no prompt and no messages"
                if prompt is None
                else "the row has both a prompt and messages",
                hint="give each row one of them, or name its column in `columns`",
            )
        if messages is not None:
            ids = self._text.encode_chat(_checked_messages(messages))
        elif isinstance(prompt, str):
            ids = self._text.encode(prompt)
        else:
            ids = _checked_ids(prompt)
            self._check_ids(ids, _PROMPT)
        if not ids:
            raise InputError("the prompt has no tokens, expected at least one", param=_PROMPT)
        return ids

    def _check_ids(self, ids: Iterable[int], param: str) -> None:
        for token_id in ids:
            if not 0 <= token_id < self._info.vocab_size:
                raise InputError(
                    f"token id {token_id} is not in the vocabulary of {self._info.vocab_size}",
                    param=param,
                )

    def _options(self, own: Values) -> GenerationConfig:
        stop = own.get("stop")
        if isinstance(stop, str):
            own["stop"] = [stop]
        try:
            return GenerationConfig.model_validate({**self._defaults.model_dump(), **own})
        except ValidationError as error:
            raise InputError(first_problem(error)) from None


def _grammar_of(chosen: GenerationConfig) -> Grammar | None:
    if chosen.json_schema is None:
        return None if chosen.regex is None else Grammar("regex", chosen.regex)
    if chosen.regex is not None:
        raise InputError("the row has both a json_schema and a regex", param="regex")
    return Grammar("json_schema", chosen.json_schema)


def _answer(prompt: Prompt, found: Continuation) -> Answer | InputError:
    if found.refusal is not None:
        return found.refusal
    values = {"text": found.text, "finish_reason": found.finish_reason}
    counts = {"prompt_tokens": len(prompt.token_ids), "completion_tokens": len(found.token_ids)}
    return Answer({**values, **counts}, **counts)


def _checked_ids(prompt: Any) -> list[int]:
    is_list = isinstance(prompt, list)
    if not is_list or not all(isinstance(i, int) and not isinstance(i, bool) for i in prompt):
        raise InputError("the prompt is neither text nor token ids", param=_PROMPT)
    return list(prompt)


def _checked_messages(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise InputError("messages is no list of messages", param=_MESSAGES)
    for message in messages:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(name), str) for name in ("role", "content")
        ):
            raise InputError("a message needs 'role' and 'content', both text", param=_MESSAGES)
    return [{k: v for k, v in message.items() if v is not None} for message in messages]
