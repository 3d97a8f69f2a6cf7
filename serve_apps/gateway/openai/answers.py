"""How OpenAI's answers look, whole and in chunks.

shape = ChatShape(asked)
shape.whole(answers, await answers.whole())
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Literal, NotRequired

import orjson
from typing_extensions import TypedDict

from serve_apps.gateway.catalogue import ServedModel
from serve_apps.gateway.openai.schema import Generation
from serve_apps.gateway.openai.text_generation import Piece, ScoredToken, TextAnswers
from serve_apps.gateway.tensorflow_serving.answers import VersionState


class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(TypedDict):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class Completion(TypedDict):
    """A whole answer, or one event of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]


class TopLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    content: list[TokenLogprob]
    refusal: None


class ChatMessage(TypedDict):
    role: Literal["assistant"]
    content: str


class ChatChoice(TypedDict):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(TypedDict):
    """A whole answer; the events of a stream have a `delta` in place of the `message`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ModelCard(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    kind: str
    version: int
    digest: str
    max_model_len: NotRequired[int]
    model_version_status: NotRequired[list[VersionState]]
    """For TensorFlow Serving's clients, who ask for one model by the same path."""


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[ModelCard]


class AnswerShape:
    """How one kind of answer looks, whole and in chunks."""

    prefix = ""
    whole_object = ""
    chunk_object = ""

    def __init__(self, asked: Generation) -> None:
        self.asked = asked
        self._id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def whole(self, answers: TextAnswers, pieces: Sequence[Piece]) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                **self.whole_text(index, piece.text),
                "logprobs": self._logprobs(piece),
                "finish_reason": answer.finish_reason,
            }
            for index, (answer, piece) in enumerate(zip(answers.answers, pieces, strict=True))
        ]
        return self._envelope(self.whole_object, choices) | {"usage": _usage(answers)}

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        return self._chunk(index, self.text_delta(piece.text), self._logprobs(piece), None)

    def opening(self, index: int) -> dict[str, Any] | None:
        """The chunk before any text of an answer, if there is one."""
        delta = self.opening_delta(index)
        return None if delta is None else self._chunk(index, delta, None, None)

    def closing(self, index: int, finish_reason: str | None) -> dict[str, Any]:
        return self._chunk(index, self.closing_delta(), None, finish_reason)

    def usage_chunk(self, answers: TextAnswers) -> dict[str, Any]:
        return self._envelope(self.chunk_object, []) | {"usage": _usage(answers)}

    def opening_delta(self, index: int) -> dict[str, Any] | None:
        raise NotImplementedError

    def whole_text(self, index: int, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def text_delta(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def closing_delta(self) -> dict[str, Any]:
        """What the chunk with the finish reason says."""
        raise NotImplementedError

    def logprobs(self, tokens: Sequence[ScoredToken]) -> dict[str, Any]:
        raise NotImplementedError

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        return None if self.asked.num_logprobs is None else self.logprobs(piece.tokens)

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None,
        finish_reason: str | None,
    ) -> dict[str, Any]:
        choice = {"index": index, **delta, "logprobs": logprobs, "finish_reason": finish_reason}
        usage = {"usage": None} if self.asked.includes_usage else {}
        return self._envelope(self.chunk_object, [choice]) | usage

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self.asked.model,
            "choices": choices,
        }


class CompletionShape(AnswerShape):
    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, asked: Generation, echoes: Sequence[str] = ()) -> None:
        super().__init__(asked)
        self._echoes = echoes
        """What each answer begins with; empty where nothing is echoed."""

    def opening_delta(self, index: int) -> dict[str, Any] | None:
        return {"text": self._echoes[index]} if self._echoes else None

    def whole_text(self, index: int, text: str) -> dict[str, Any]:
        return {"text": self._echoes[index] + text if self._echoes else text}

    def text_delta(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def closing_delta(self) -> dict[str, Any]:
        return {"text": ""}

    def logprobs(self, tokens: Sequence[ScoredToken]) -> dict[str, Any]:
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [_by_text(token) for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }


class ChatShape(AnswerShape):
    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening_delta(self, index: int) -> dict[str, Any] | None:
        return {"delta": {"role": "assistant", "content": ""}}

    def whole_text(self, index: int, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}

    def text_delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text}}

    def closing_delta(self) -> dict[str, Any]:
        return {"delta": {}}

    def logprobs(self, tokens: Sequence[ScoredToken]) -> dict[str, Any]:
        content = [
            _logprob(token.text, token.logprob)
            | {"top_logprobs": [_logprob(*top) for top in token.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}


def event(values: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + orjson.dumps(values) + b"\n\n"


def model_card(model: ServedModel, name: str | None = None) -> dict[str, Any]:
    """What a list of models says of one."""
    info = model.manifest.language_model
    return {
        "id": name or model.served.name,
        "object": "model",
        "created": _unix_time(model.manifest.created_at),
        "owned_by": "heliostat",
        "kind": model.manifest.kind,
        "version": model.served.version,
        "digest": model.served.digest,
        **({"max_model_len": info.max_context_tokens} if info is not None else {}),
    }


def _by_text(token: ScoredToken) -> dict[str, float]:
    """The most likely tokens and the chosen one; of two that look alike, the likelier."""
    return dict([(token.text, token.logprob), *reversed(token.top)])


def _logprob(text: str, logprob: float) -> dict[str, Any]:
    # A part of a character has bytes that its text no longer tells.
    values = None if "\ufffd" in text else list(text.encode())
    return {"token": text, "logprob": logprob, "bytes": values}


def _unix_time(text: str) -> int:
    try:
        return int(datetime.fromisoformat(text).timestamp())
    except ValueError:
        return 0


def _usage(answers: TextAnswers) -> Usage:
    prompt_tokens, completion_tokens = answers.prompt_tokens, answers.completion_tokens
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
