"""A batch's lines: requests become rows of `jobs.predict`, its answers become OpenAI's lines.

Bodies are read by the same code as live ones, so what is refused there is refused here.

    request = read_request(7, line, endpoint="/v1/chat/completions")
    rows = to_rows(7, request, "/v1/chat/completions", model, TextLimits())
    line = answer_line(batch, answers)
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.batches import Batch
from cluster.errors import HeliostatError, InputError, PayloadTooLargeError
from serve_apps.gateway.catalogue import ServedModel
from serve_apps.gateway.http.errors import body_for
from serve_apps.gateway.http.requests import parse_object, validate
from serve_apps.gateway.openai.answer_formats import check_formats_now
from serve_apps.gateway.openai.embedding_graph import EmbeddingGraph
from serve_apps.gateway.openai.embeddings import EmbeddingRequest
from serve_apps.gateway.openai.prompts import (
    DEFAULT_COMPLETION_TOKENS,
    check_max_tokens,
    check_num_choices,
    seed_of_choice,
)
from serve_apps.gateway.openai.schema import Generation, TextLimits, read_chat, read_completion

CUSTOM_ID, META, TOKENS = "custom_id", "_batch", "_tokens"
"""Columns of a row that come back with its answer: the client's id, what we must know, and, of what
a graph reads, how many tokens it is."""
_MAX_CUSTOM_ID_CHARACTERS = 512
MAX_LINE_BYTES = 32 * 1024**2
"""As much as a live body may have."""

# What live requests may ask for and lines of a batch cannot, with the values that change nothing.
_LIVE_ONLY: dict[str, tuple[Any, ...]] = {
    "echo": (None, False),
    "logprobs": (None, False),
    "stream": (None, False),
    "top_logprobs": (None, 0),
}

Row = Mapping[str, Any]


class LineError(InputError):
    """What is wrong with a line as such, which fails the whole batch."""

    code = "invalid_batch_line"

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.reason = code


@dataclass(frozen=True)
class Request:
    """One line that can be understood."""

    custom_id: str
    body: dict[str, Any]

    @property
    def model(self) -> str:
        return str(self.body["model"])


def read_request(number: int, line: bytes, *, endpoint: str) -> Request:
    """The request on a line; its body is only looked at for the model.

    Raises:
        LineError: with OpenAI's code for it.
    """
    if len(line) > MAX_LINE_BYTES:
        raise LineError(
            "invalid_json_line",
            f"line {number} has more than {MAX_LINE_BYTES} bytes, the most allowed",
        )
    try:
        values = parse_object(line)
    except (InputError, PayloadTooLargeError) as error:
        raise LineError(
            "invalid_json_line", f"line {number}: {error.message}".replace("request body", "line")
        ) from None
    custom_id = values.get(CUSTOM_ID)
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= _MAX_CUSTOM_ID_CHARACTERS:
        raise LineError(
            "missing_required_parameter",
            f"line {number}: custom_id is not a text of 1 to {_MAX_CUSTOM_ID_CHARACTERS} "
            "characters",
            CUSTOM_ID,
        )
    if values.get("method") != "POST":
        raise LineError("invalid_method", f"line {number}: method is not POST", "method")
    if values.get("url") != endpoint:
        raise LineError(
            "mismatched_endpoint", f"line {number}: url is not the batch's, {endpoint}", "url"
        )
    body = values.get("body")
    if not isinstance(body, dict) or not isinstance(body.get("model"), str):
        raise LineError(
            "missing_required_parameter", f"line {number}: body names no model", "body.model"
        )
    return Request(custom_id, body)


@dataclass(frozen=True)
class Endpoint:
    """How requests of one endpoint become rows, and their answers bodies."""

    is_text: bool
    """Whether language models answer it, rather than graphs."""
    to_rows: Callable[[bytes, ServedModel, TextLimits], list[dict[str, Any]]]
    """One row for each answer to a body; raises InputError naming the parameter."""
    to_body: Callable[[Batch, Sequence[Row]], dict[str, Any]]
    """From all the answers to a body."""


def _chat_rows(body: bytes, _model: ServedModel, limits: TextLimits) -> list[dict[str, Any]]:
    asked = read_chat(body)
    messages = [message.for_template() for message in asked.messages]
    max_tokens = asked.max_completion_tokens or asked.max_tokens
    return _text_rows(asked, [{"messages": messages}], max_tokens, limits)


def _completion_rows(body: bytes, _model: ServedModel, limits: TextLimits) -> list[dict[str, Any]]:
    asked = read_completion(body)
    max_tokens = asked.max_tokens or DEFAULT_COMPLETION_TOKENS
    prompts = [{"prompt": prompt} for prompt in asked.prompts]
    return _text_rows(asked, prompts, max_tokens, limits)


def _text_rows(
    asked: Generation,
    prompts: Sequence[dict[str, Any]],
    max_tokens: int | None,
    limits: TextLimits,
) -> list[dict[str, Any]]:
    asked.check()
    check_formats_now(asked.response_format, asked.structured_outputs)
    check_num_choices(asked, len(prompts), limits)
    check_max_tokens(max_tokens, limits)
    for name, harmless in _LIVE_ONLY.items():
        if getattr(asked, name, None) not in harmless:
            raise InputError(
                f"parameter '{name}' is not supported in a batch", hint="leave it out", param=name
            )
    held: dict[str, Any] = (
        {} if asked.grammar is None else {asked.grammar.kind: asked.grammar.source}
    )
    return [
        {
            **prompt,
            "max_tokens": max_tokens,
            "temperature": 1.0 if asked.temperature is None else asked.temperature,
            "top_p": asked.top_p,
            "top_k": None if asked.top_k is None else max(0, asked.top_k),
            "min_p": asked.min_p,
            "frequency_penalty": asked.frequency_penalty,
            "presence_penalty": asked.presence_penalty,
            "repetition_penalty": asked.repetition_penalty,
            "logit_bias": asked.logit_bias,
            "seed": seed_of_choice(asked.seed, index),
            "stop": asked.stops or None,
            **held,
        }
        for prompt in prompts
        for index in range(asked.num_choices)
    ]


def _chat_body(batch: Batch, rows: Sequence[Row]) -> dict[str, Any]:
    texts = [{"message": {"role": "assistant", "content": row["text"]}} for row in rows]
    return _text_body(batch, rows, "chatcmpl", "chat.completion", texts)


def _completion_body(batch: Batch, rows: Sequence[Row]) -> dict[str, Any]:
    texts = [{"text": row["text"]} for row in rows]
    return _text_body(batch, rows, "cmpl", "text_completion", texts)


def _text_body(
    batch: Batch, rows: Sequence[Row], prefix: str, kind: str, texts: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    choices = [
        {"index": index, **text, "logprobs": None, "finish_reason": row["finish_reason"]}
        for index, (row, text) in enumerate(zip(rows, texts, strict=True))
    ]
    # A prompt counts once, however many answers it has.
    prompt_tokens = sum(row["prompt_tokens"] for row in rows[:: rows[0][META]["choices"]])
    completion_tokens = sum(row["completion_tokens"] for row in rows)
    return {
        "id": f"{prefix}-{_line_id(batch, rows[0])}",
        "object": kind,
        "created": batch.moments.get("in_progress_at", batch.moments["created_at"]),
        "model": batch.model,
        "choices": choices,
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }


def _embedding_rows(body: bytes, model: ServedModel, limits: TextLimits) -> list[dict[str, Any]]:
    asked = validate(EmbeddingRequest, parse_object(body))
    graph = EmbeddingGraph.of(model)
    graph.check_dimensions(asked.dimensions)
    rows: dict[int, dict[str, Any]] = {}
    for places, arrays in graph.prepare(asked.items, limits).groups:
        for index, place in enumerate(places):
            values = {name: _plain(array[index]) for name, array in arrays.items()}
            num_tokens = arrays[graph.main.name][index].size if graph.takes_tokens else 0
            meta = {"format": asked.encoding_format, "output": graph.output.name}
            rows[place] = {**values, TOKENS: int(num_tokens), META: meta}
    return [rows[place] for place in sorted(rows)]


def _plain(array: Any) -> Any:
    values = array.tolist() if isinstance(array, np.ndarray | np.generic) else array
    if isinstance(values, list):
        return [_plain(value) for value in values]
    return values.decode() if isinstance(values, bytes) else values


def _embedding_body(batch: Batch, rows: Sequence[Row]) -> dict[str, Any]:
    num_tokens = sum(row[TOKENS] for row in rows)
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": _vector(row)}
            for index, row in enumerate(rows)
        ],
        "model": batch.model,
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }


def _vector(row: Row) -> list[float] | str:
    values: list[float] = row[row[META]["output"]]
    if row[META]["format"] != "base64":
        return values
    return base64.b64encode(np.asarray(values, dtype="<f4").tobytes()).decode()


ENDPOINTS: dict[str, Endpoint] = {
    "/v1/chat/completions": Endpoint(True, _chat_rows, _chat_body),
    "/v1/completions": Endpoint(True, _completion_rows, _completion_body),
    "/v1/embeddings": Endpoint(False, _embedding_rows, _embedding_body),
}


def to_rows(
    number: int, request: Request, endpoint: str, model: ServedModel, limits: TextLimits
) -> list[dict[str, Any]]:
    """What `jobs.predict` reads for a request: a row for each answer.

    Raises:
        InputError: the body asks for what cannot be done; that line alone fails.
    """
    rows = ENDPOINTS[endpoint].to_rows(json.dumps(request.body).encode(), model, limits)
    # To JSON 3.0 is 3, and was taken for it; what counts rows must be one.
    choices = int(request.body.get("n") or 1)
    meta = {"line": number, "rows": len(rows), "choices": choices}
    return [
        {
            **{name: value for name, value in row.items() if value is not None},
            CUSTOM_ID: request.custom_id,
            META: {**row.get(META, {}), **meta},
        }
        for row in rows
    ]


def line_of(row: Row) -> int:
    """The line of the input file that a row is from."""
    return int(row[META]["line"])


def answer_line(batch: Batch, rows: Sequence[Row]) -> dict[str, Any] | None:
    """The answers to a request as a line of the output file; None while some are missing."""
    if len(rows) < rows[0][META]["rows"]:
        return None
    body = ENDPOINTS[batch.endpoint].to_body(batch, rows)
    return _line(batch, rows[0], _response(batch, rows[0], 200, body), None)


def refused_line(batch: Batch, row: Row, error: HeliostatError) -> dict[str, Any]:
    """A request that was refused, as a line of the error file."""
    body = body_for(error, batch.endpoint)
    return _line(batch, row, _response(batch, row, error.http_status, body), None)


def unanswered_line(batch: Batch, row: Row, reason: str) -> dict[str, Any]:
    """A request that was not begun, since the batch ended early."""
    messages = {
        "batch_expired": "This request could not be executed before the completion window expired.",
        "batch_cancelled": "This request was not executed, because the batch was cancelled.",
        "insufficient_quota": "This request was not executed: the tenant has no tokens left.",
    }
    return _line(batch, row, None, {"code": reason, "message": messages[reason]})


def _line(
    batch: Batch,
    row: Row,
    response: dict[str, Any] | None,
    error: dict[str, Any] | None,
) -> dict[str, Any]:
    return {
        "id": f"batch_req_{_line_id(batch, row)}",
        CUSTOM_ID: row[CUSTOM_ID],
        "response": response,
        "error": error,
    }


def _response(batch: Batch, row: Row, status: int, body: dict[str, Any]) -> dict[str, Any]:
    request_id = f"req_{_line_id(batch, row)}"
    return {"status_code": status, "request_id": request_id, "body": body}


def _line_id(batch: Batch, row: Row) -> str:
    """The same whenever the file is written again."""
    return hashlib.sha256(f"{batch.id}/{line_of(row)}".encode()).hexdigest()[:32]
