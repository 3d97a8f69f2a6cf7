"""A document of a corpus: a text or a conversation, and where it stands.

It knows nothing about files or tokens.

    measure(document)      # → Measure(digest, characters, size_bytes)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from cluster.errors import InputError

Message = dict[str, Any]
Conversation = list[Message]
Content = str | Conversation
Locate = Callable[[], str]
"""Says where something stands (`corpus.jsonl:17`); called only for a message, since it may have to
count lines."""

Item = TypeVar("Item")

# What is held at once: tokenising a character takes about a hundred bytes for a moment.
_BATCH_CHARACTERS = 1_000_000
_BATCH_DOCUMENTS = 4096


@dataclass(frozen=True, slots=True)
class Document:
    content: Content
    locate: Locate

    @property
    def text(self) -> str:
        assert isinstance(self.content, str)
        return self.content

    @property
    def num_characters(self) -> int:
        if isinstance(self.content, str):
            return len(self.content)
        return sum(len(message["content"]) for message in self.content)


@dataclass(frozen=True, slots=True)
class Measure:
    """What a corpus remembers of a document."""

    digest: bytes
    """16 bytes."""
    characters: int
    size_bytes: int


def measure(document: Document) -> Measure:
    """Raises InputError for text that is not valid Unicode."""
    content = document.content
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"'{document.locate()}' has a lone surrogate at character {error.start}, expected "
            "valid Unicode",
            hint="correct or remove it",
            param="data.source",
        ) from None
    # 128 bits: among 10^12 documents two would be taken for equal with odds of one in 10^15.
    digest = hashlib.blake2b(data, digest_size=16).digest()
    return Measure(digest, document.num_characters, len(data))


def check_conversation(value: Any, locate: Locate, field: str) -> Conversation:
    """Raises InputError for anything but a list of messages with a role and a text."""
    if not isinstance(value, list) or not value:
        raise _not_a_conversation(locate, f"field '{field}' is no list of messages")
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict):
            raise _not_a_conversation(locate, f"message {number} is no object")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                found = _kind_of(message[key]) if key in message else "missing"
                problem = f"'{key}' of message {number} is {found}"
                raise _not_a_conversation(locate, problem, expected="a text")
    return value


def check_text(record: Any, field: str, locate: Locate) -> str:
    """The text in a field of a JSON object or a row."""
    value = _field(record, field, locate)
    if not isinstance(value, str):
        raise InputError(
            f"'{locate()}': field '{field}' is {_kind_of(value)}, expected a text",
            hint="correct data.source.text_field or the data",
            param="data.source.text_field",
        )
    return value


def check_messages(record: Any, field: str, locate: Locate) -> Conversation:
    """The conversation in a field of a JSON object."""
    return check_conversation(_field(record, field, locate), locate, field)


def batched(items: Iterable[Item], characters: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Lists that are small enough to hold while their tokens are made."""
    batch: list[Item] = []
    held = 0
    for item in items:
        batch.append(item)
        held += characters(item)
        if held >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def missing_field(place: str, field: str, present: Sequence[str]) -> InputError:
    return InputError(
        f"'{place}' has no field '{field}', it has: {', '.join(present) or 'none'}",
        hint="correct data.source.text_field or data.source.messages_field",
        param="data.source",
    )


def _field(record: Any, field: str, locate: Locate) -> Any:
    if not isinstance(record, dict):
        raise InputError(
            f"'{locate()}' is {_kind_of(record)}, expected a JSON object",
            hint=f'write it like {{"{field}": …}}',
            param="data.source.paths",
        )
    if field not in record:
        raise missing_field(locate(), field, [str(name) for name in record])
    return record[field]


def _not_a_conversation(
    locate: Locate, problem: str, *, expected: str = "a list of messages"
) -> InputError:
    return InputError(
        f"'{locate()}': {problem}, expected {expected}",
        hint='write it like [{"role": "user", "content": "…"}, …]',
        param="data.source.messages_field",
    )


def _kind_of(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    if value is None:
        return "null"
    return names.get(type(value), "a number" if isinstance(value, int | float) else "no text")
