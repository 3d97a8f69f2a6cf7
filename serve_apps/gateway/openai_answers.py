"""How OpenAI's answers look, whole and in chunks.

shape = ChatShape(asked)
shape.whole("Hello", answer)
"""

from __future__ import annotations

import json
import time
import uuid
from datetime import datetime
from typing import Any

from serve_apps.gateway.catalogue import ServedModel
from serve_apps.gateway.openai_schema import Generation
from serve_apps.gateway.text_generation import TextAnswer


class AnswerShape:
    """How one kind of answer looks, whole and in chunks."""

    prefix = ""
    whole_object = ""
    chunk_object = ""

    def __init__(self, asked: Generation) -> None:
        self.asked = asked
        self._id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def whole(self, text: str, answer: TextAnswer) -> dict[str, Any]:
        choice = {"index": 0, **self.whole_text(text), "logprobs": None}
        choice["finish_reason"] = answer.finish_reason
        return self._envelope(self.whole_object, [choice]) | {"usage": _usage(answer)}

    def chunk(self, delta: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, **delta, "logprobs": None, "finish_reason": finish_reason}
        usage = {"usage": None} if self.asked.includes_usage else {}
        return self._envelope(self.chunk_object, [choice]) | usage

    def usage_chunk(self, answer: TextAnswer) -> dict[str, Any]:
        return self._envelope(self.chunk_object, []) | {"usage": _usage(answer)}

    def opening(self) -> dict[str, Any] | None:
        """What a first chunk says before any text."""
        return None

    def whole_text(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def text_delta(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def closing(self) -> dict[str, Any]:
        """What the chunk with the finish reason says."""
        raise NotImplementedError

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

    def whole_text(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def text_delta(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def closing(self) -> dict[str, Any]:
        return {"text": ""}


class ChatShape(AnswerShape):
    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": ""}}

    def whole_text(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}

    def text_delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text}}

    def closing(self) -> dict[str, Any]:
        return {"delta": {}}


def event(values: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(values, ensure_ascii=False)}\n\n"


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


def _unix_time(text: str) -> int:
    try:
        return int(datetime.fromisoformat(text).timestamp())
    except ValueError:
        return 0


def _usage(answer: TextAnswer) -> dict[str, int]:
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
    }
