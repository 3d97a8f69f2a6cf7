"""The requests of OpenAI's protocol that are understood here, and what is refused by name.

A parameter is never ignored: it is used, or harmless at the value sent, or an error.

    request = read_completion(await request.body())
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from cluster.errors import InputError
from serve_apps.gateway.requests import parse_object, validate

_MAX_STOPS = 16
_MAX_STOP_CHARACTERS = 256

# Parameters of the protocol, or of popular clients, that are not supported, with the values at
# which they change nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none"),
    "functions": (None, []),
    "ignore_eos": (None, False),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "metadata": (None, {}),
    "min_p": (None, 0),
    "modalities": (None, ["text"]),
    "n": (None, 1),
    "parallel_tool_calls": (None, True, False),
    "prediction": (None,),
    "presence_penalty": (None, 0),
    "reasoning_effort": (None, "none"),
    "repetition_penalty": (None, 1),
    "response_format": (None, {"type": "text"}),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "top_logprobs": (None, 0),
}


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class StreamOptions(_Request):
    include_usage: bool = False
    include_obfuscation: bool = False
    """OpenAI's padding against traffic analysis; there is none here, with or without it."""


class Generation(_Request):
    """What completions and chat have in common."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    """Not OpenAI's, but many clients'; 0 and -1 keep all tokens."""
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    user: str | None = None
    """A tag for the caller's own use; it changes nothing."""

    @property
    def stops(self) -> list[str]:
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(Generation):
    """POST /v1/completions."""

    prompt: str | list[int] | list[str] | list[list[int]]

    def single_prompt(self) -> str | list[int]:
        """The prompt. Raises InputError for several, which would be several requests."""
        prompt = self.prompt
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            return prompt
        if len(prompt) == 1:
            return prompt[0]  # type: ignore[return-value]
        raise InputError(
            f"parameter 'prompt' holds {len(prompt)} prompts, expected one",
            hint="send one request for each prompt",
            param="prompt",
        )


class TextPart(_Request):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn; keys that a template does not know are refused unless they are null."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def for_template(self) -> dict[str, Any]:
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        # OpenAI renamed 'system' to 'developer'; templates know the old name.
        role = "system" if self.role == "developer" else self.role
        values = {"role": role, "content": text}
        return values if self.name is None else values | {"name": self.name}


class ChatRequest(Generation):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)


RequestType = TypeVar("RequestType", bound=Generation)


def read_completion(body: bytes) -> CompletionRequest:
    """Raises InputError naming the parameter at fault."""
    return _checked(validate(CompletionRequest, _supported(parse_object(body))))


def read_chat(body: bytes) -> ChatRequest:
    """Raises InputError naming the parameter at fault."""
    values = _supported(parse_object(body))
    messages = values.get("messages")
    if isinstance(messages, list):
        values["messages"] = [_without_nulls(message) for message in messages]
    request = _checked(validate(ChatRequest, values))
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise InputError(
            "parameters 'max_tokens' and 'max_completion_tokens' are both set",
            hint="send max_completion_tokens alone",
            param="max_tokens",
        )
    return request


def _supported(values: dict[str, Any]) -> dict[str, Any]:
    """The parameters that mean something here."""
    for name, harmless in _UNSUPPORTED.items():
        if name in values and values.pop(name) not in harmless:
            shown = next((value for value in harmless if value is not None), None)
            raise InputError(
                f"parameter '{name}' is not supported",
                hint="leave it out" + (f", or send {shown!r}" if shown is not None else ""),
                param=name,
            )
    return values


def _checked(request: RequestType) -> RequestType:
    if request.stream_options is not None and not request.stream:
        raise InputError("parameter 'stream_options' needs 'stream': true", param="stream_options")
    if len(request.stops) > _MAX_STOPS:
        raise InputError(
            f"parameter 'stop' has {len(request.stops)} strings, at most {_MAX_STOPS} are allowed",
            param="stop",
        )
    if any(not 0 < len(stop) <= _MAX_STOP_CHARACTERS for stop in request.stops):
        raise InputError(
            f"parameter 'stop' needs strings of 1 to {_MAX_STOP_CHARACTERS} characters",
            param="stop",
        )
    return request


def _without_nulls(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    return {key: value for key, value in message.items() if value is not None}
