"""What form an answer is to have: OpenAI's `response_format`, and vLLM's name for more.

grammar = grammar_of(asked.response_format, asked.structured_outputs)
await check_formats(asked.response_format, asked.structured_outputs)
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field

from cluster.errors import InputError
from cluster.generation import Grammar
from cluster.grammars import MAX_REGEX_CHARACTERS, check_grammar

_ANY_OBJECT = Grammar("json_schema", '{"type":"object"}')
_FORMAT, _OUTPUTS = "response_format", "structured_outputs"
_SCHEMA = f"{_FORMAT}.json_schema"


class _Format(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class NamedSchema(_Format):
    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    schema_: dict[str, Any] = Field(alias="schema")
    """JSON Schema; OpenAI's clients write it from a Pydantic model."""
    strict: bool | None = None
    """An answer is held to the schema whatever this says."""
    description: Annotated[str, Field(max_length=4096)] | None = None


class ResponseFormat(_Format):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None
    """For type `json_schema` alone."""


class StructuredOutputs(_Format):
    regex: str = Field(max_length=MAX_REGEX_CHARACTERS)
    """The whole answer matches it."""


def grammar_of(form: ResponseFormat | None, outputs: StructuredOutputs | None) -> Grammar | None:
    """What an answer is held to, if to anything."""
    if outputs is not None:
        return Grammar("regex", outputs.regex)
    if form is None or form.type == "text":
        return None
    if form.json_schema is None:
        return _ANY_OBJECT
    return Grammar("json_schema", orjson.dumps(form.json_schema.schema_).decode())


def field_of_format(form: ResponseFormat | None, outputs: StructuredOutputs | None) -> str | None:
    """The parameter that holds the grammar, if there is one."""
    if outputs is not None:
        return f"{_OUTPUTS}.regex"
    if form is None or form.type == "text":
        return None
    return _FORMAT if form.json_schema is None else f"{_SCHEMA}.schema"


async def check_formats(form: ResponseFormat | None, outputs: StructuredOutputs | None) -> None:
    """Raises InputError naming the parameter that is wrong, contradicts, or is too complex."""
    if form is not None or outputs is not None:
        # It takes a millisecond, or hundreds where somebody means harm.
        await asyncio.to_thread(check_formats_now, form, outputs)


def check_formats_now(form: ResponseFormat | None, outputs: StructuredOutputs | None) -> None:
    """As `check_formats`, in a thread that may be held up."""
    if form is not None and (form.type == "json_schema") != (form.json_schema is not None):
        raise InputError(
            f"parameter '{_SCHEMA}' goes with the type 'json_schema', and type is '{form.type}'",
            param=_SCHEMA,
        )
    if form is not None and outputs is not None:
        raise InputError(
            f"parameters '{_FORMAT}' and '{_OUTPUTS}' are both set",
            hint="leave one of them out",
            param=_OUTPUTS,
        )
    grammar = grammar_of(form, outputs)
    if grammar is None:
        return
    param = field_of_format(form, outputs)
    try:
        check_grammar(grammar)
    except InputError as error:
        raise InputError(f"parameter '{param}': {error.message}", param=param) from None
