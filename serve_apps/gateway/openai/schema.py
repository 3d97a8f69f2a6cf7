"""The requests of OpenAI's protocol that are understood here, and what is refused by name.

A parameter is never ignored: it is used, or harmless at the value sent, or an error.

    request = read_completion(await request.body())
"""

from __future__ import annotations

import functools
import json
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from cluster.config import StrictModel
from cluster.errors import InputError
from cluster.generation import Grammar
from serve_apps.gateway.http.requests import as_whole_numbers, parse_object, validate
from serve_apps.gateway.openai.answer_formats import (
    ResponseFormat,
    StructuredOutputs,
    field_of_format,
    grammar_of,
)

_MAX_STOPS = 16
_MAX_STOP_CHARACTERS = 256
_MAX_TAG_CHARACTERS = 512
_MAX_MODEL_CHARACTERS = 300
_MAX_MESSAGES = 10_000
_MAX_TOP_LOGPROBS = 20
_MAX_BIASES = 1024

# Parameters of the protocol, or of popular clients, that are not supported, with the values at
# which they change nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "function_call": (None, "none"),
    "functions": (None, []),
    "ignore_eos": (None, False),
    "metadata": (None, {}),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, True, False),
    "prediction": (None,),
    "reasoning_effort": (None, "none"),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
}

ItemType = TypeVar("ItemType")
WHOLE = BeforeValidator(as_whole_numbers)
# A list of a million wrong items is one error, not a million.
Many = Annotated[list[ItemType], Field(fail_fast=True)]
ModelName = Annotated[str, Field(max_length=_MAX_MODEL_CHARACTERS)]
_Stop = Annotated[str, Field(min_length=1, max_length=_MAX_STOP_CHARACTERS)]
Tag = Annotated[str, Field(max_length=_MAX_TAG_CHARACTERS)]
_TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
_Bias = Annotated[float, Field(ge=-100, le=100)]
_Biases = Annotated[
    dict[_TokenId, _Bias],
    Field(max_length=_MAX_BIASES),
    WithJsonSchema(
        {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,9}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            "maxProperties": _MAX_BIASES,
        }
    ),
]


class TextLimits(StrictModel):
    """How much one request to a language model, or for embeddings, may ask for."""

    max_prompt_characters: int = Field(1_000_000, ge=1)
    """Characters of a prompt, or of all messages of a chat; what a model can hold may be less."""
    max_choices: int = Field(64, ge=1)
    """Answers to one request: prompts times `n`. Each is a stream of its own."""
    max_completion_tokens: int = Field(32_768, ge=1)
    """Tokens of one answer; what a model can hold may be less."""
    max_embedding_inputs: int = Field(2048, ge=1)
    """Inputs of one request for embeddings."""
    max_embedding_tokens: int = Field(8192, ge=1)
    """Tokens of one input for embeddings."""


def _describe_unsupported(schema: dict[str, Any]) -> None:
    for name, harmless in _UNSUPPORTED.items():
        schema["properties"][name] = {"enum": list(harmless), "description": "Not supported."}


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class StreamOptions(_Request):
    include_usage: bool = False
    include_obfuscation: bool = False
    """OpenAI's padding against traffic analysis; there is none here, with or without it."""


class Generation(_Request):
    """What completions and chat have in common."""

    model_config = ConfigDict(json_schema_extra=_describe_unsupported)

    model: ModelName
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1), WHOLE] | None = None
    n: Annotated[int, Field(ge=1, le=128), WHOLE] | None = None
    """Answers to each prompt."""
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: Annotated[int, Field(ge=-1), WHOLE] | None = None
    """Not OpenAI's, but many clients'; 0 and -1 keep all tokens."""
    min_p: float | None = Field(None, ge=0, le=1)
    """Likewise."""
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.01, le=10)
    """Not OpenAI's either."""
    logit_bias: _Biases | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63), WHOLE] | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=_MAX_STOPS)] | None = None
    response_format: ResponseFormat | None = None
    """What JSON the answer is; to OpenAI a parameter of chats alone."""
    structured_outputs: StructuredOutputs | None = None
    """vLLM's name for what else an answer can be held to."""
    user: Tag | None = None
    """A tag for whoever asks; during a canary the same one stays with one version."""

    @property
    def stops(self) -> list[str]:
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def num_choices(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    @property
    def num_logprobs(self) -> int | None:
        """Most likely tokens to report beside each; None reports nothing."""
        raise NotImplementedError

    @functools.cached_property
    def grammar(self) -> Grammar | None:
        """What the answers are held to."""
        return grammar_of(self.response_format, self.structured_outputs)

    def field_of(self, param: str | None) -> str | None:
        """The parameter that an engine means: what it finds out on the way is the grammar's."""
        if param in (None, "json_schema", "regex"):
            return field_of_format(self.response_format, self.structured_outputs)
        return param

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def check(self) -> None:
        """Raises InputError where parameters contradict each other."""
        if self.stream_options is not None and not self.stream:
            raise InputError(
                "parameter 'stream_options' needs 'stream': true", param="stream_options"
            )


class CompletionRequest(Generation):
    """POST /v1/completions."""

    prompt: Annotated[str | Many[int] | Many[str] | Many[Many[int]], WHOLE]
    """Text, or token ids; one prompt or several."""
    echo: bool | None = None
    """Begin each answer with its prompt."""
    logprobs: Annotated[int, Field(ge=0, le=_MAX_TOP_LOGPROBS), WHOLE] | None = None
    best_of: Annotated[int, Field(ge=1), WHOLE] | None = None
    """Supported where it is `n`, since all answers are given."""

    @property
    def prompts(self) -> list[str | list[int]]:
        prompt = self.prompt
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            return [prompt]
        return cast("list[str | list[int]]", prompt)

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    def check(self) -> None:
        super().check()
        if self.best_of not in (None, self.num_choices):
            raise InputError(
                f"parameter 'best_of' is {self.best_of} and not n, which is not supported",
                hint="leave it out",
                param="best_of",
            )
        if self.echo and self.logprobs is not None:
            raise InputError(
                "parameter 'echo' is not supported with 'logprobs': a prompt is not scored",
                hint="leave one of them out",
                param="echo",
            )


class TextPart(_Request):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn; keys that a template does not know are refused unless they are null."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"additionalProperties": {"type": "null"}}
    )

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: Tag | None = None

    @property
    def text(self) -> str:
        content = self.content
        return content if isinstance(content, str) else "".join(part.text for part in content)

    def for_template(self) -> dict[str, Any]:
        # OpenAI renamed 'system' to 'developer'; templates know the old name.
        role = "system" if self.role == "developer" else self.role
        values = {"role": role, "content": self.text}
        return values if self.name is None else values | {"name": self.name}


class ChatRequest(Generation):
    """POST /v1/chat/completions."""

    messages: Many[Message] = Field(min_length=1, max_length=_MAX_MESSAGES)
    max_completion_tokens: Annotated[int, Field(ge=1), WHOLE] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=_MAX_TOP_LOGPROBS), WHOLE] | None = None

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def field_of(self, param: str | None) -> str | None:
        if param == "prompt":
            return "messages"
        if param == "max_tokens" and self.max_completion_tokens is not None:
            return "max_completion_tokens"
        return super().field_of(param)

    def check(self) -> None:
        super().check()
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise InputError(
                "parameters 'max_tokens' and 'max_completion_tokens' are both set",
                hint="send max_completion_tokens alone",
                param="max_tokens",
            )
        if self.top_logprobs and not self.logprobs:
            raise InputError(
                "parameter 'top_logprobs' needs 'logprobs': true", param="top_logprobs"
            )


def read_completion(body: bytes) -> CompletionRequest:
    """Raises InputError naming the parameter at fault."""
    return validate(CompletionRequest, _supported(parse_object(body)))


def read_chat(body: bytes) -> ChatRequest:
    """Raises InputError naming the parameter at fault."""
    values = _supported(parse_object(body))
    messages = values.get("messages")
    if isinstance(messages, list):
        values["messages"] = [_without_nulls(message) for message in messages]
    return validate(ChatRequest, values)


def _supported(values: dict[str, Any]) -> dict[str, Any]:
    """The parameters that mean something here."""
    for name, harmless in _UNSUPPORTED.items():
        if name in values and not _is_among(values.pop(name), harmless):
            shown = next((value for value in harmless if value is not None), None)
            raise InputError(
                f"parameter '{name}' is not supported",
                hint="leave it out"
                + (f", or send {json.dumps(shown)}" if shown is not None else ""),
                param=name,
            )
    return values


def _is_among(value: Any, harmless: tuple[Any, ...]) -> bool:
    """Whether one equals the value; to Python 0 equals false, to JSON it does not."""
    return any(
        value == one and isinstance(value, bool) == isinstance(one, bool) for one in harmless
    )


def _without_nulls(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    return {key: value for key, value in message.items() if value is not None}
