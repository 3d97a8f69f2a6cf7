"""Text in, token ids out, and back again, at the edge of serving.

Knows a Hugging Face directory's `tokenizer.json` and chat template; knows nothing of models,
requests or HTTP, and never loads torch.

    text = TextProcessor.load(package.path / "model")
    prompt_ids = text.encode("Hello")
    pieces = text.detokenizer()
    print(pieces.push([17, 4]), pieces.flush())
"""

from __future__ import annotations

import functools
import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from cluster.errors import InputError, PackageError
from cluster.processing.chat_template import render_chat

_REPLACEMENT = "\ufffd"
_MAX_HELD_REPLACEMENTS = 3
"""A UTF-8 character has at most four bytes, so at most three are waiting for their last one."""
_MAX_WINDOW_TOKENS = 64
_KEPT_WINDOW_TOKENS = 16


@dataclass
class TextProcessor:
    """A package's tokenizer and chat template."""

    _plain: Any
    """Reads special tokens in its input as ordinary text: for whatever a user wrote."""
    _marked: Any
    """Reads special tokens as such: for what a chat template wrote."""
    chat_template: str | None = None
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    """The template's names for special tokens, e.g. `bos_token`."""

    @classmethod
    def load(cls, model_dir: Path) -> TextProcessor:
        """Read `tokenizer.json` and the chat template of a Hugging Face directory.

        Raises:
            PackageError: there is no tokenizer.json, or it cannot be read.
        """
        path = model_dir / "tokenizer.json"
        if not path.is_file():
            raise PackageError(
                f"'{model_dir}' has no tokenizer.json, which serving needs",
                hint="save the tokenizer with transformers' fast tokenizer and import it again",
            )
        try:
            source = path.read_text(encoding="utf-8")
            plain, marked = Tokenizer.from_str(source), Tokenizer.from_str(source)
        except Exception as error:  # tokenizers raises bare Exception
            raise PackageError(
                f"'{path}' is not a tokenizer: {error}", hint="import the model again"
            ) from None
        for tokenizer in (plain, marked):
            # Training leaves these in the file; they would cut and pad what users send.
            tokenizer.no_truncation()
            tokenizer.no_padding()
        plain.encode_special_tokens = True
        config = _read_json(model_dir / "tokenizer_config.json")
        return cls(plain, marked, _find_template(model_dir, config), _special_tokens(config))

    def encode(self, text: str) -> list[int]:
        """Token ids of a user's text, with what the tokenizer adds around it (such as BOS).

        Special tokens written out in the text are plain text.

        Raises:
            InputError: the text is not valid Unicode (a lone surrogate).
        """
        return list(self._plain.encode(_checked(text), add_special_tokens=True).ids)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation rendered by the chat template.

        Only the template's own special tokens count: those in message contents are plain text.

        Raises:
            InputError: there is no template, or it refuses the conversation.
        """
        guard = SpecialTokenGuard(self._special_contents())
        rendered = self.render_chat([guard.hide(message) for message in messages])
        ids: list[int] = []
        for piece, is_users in guard.split(rendered):
            tokenizer = self._plain if is_users else self._marked
            ids.extend(tokenizer.encode(piece, add_special_tokens=False).ids)
        return ids

    def render_chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The conversation as the model's chat template writes it, up to the assistant's turn."""
        if self.chat_template is None:
            raise InputError(
                "this model has no chat template, so it cannot answer messages",
                hint="send a prompt to /v1/completions instead",
                param="messages",
            )
        for message in messages:
            _checked(str(message.get("content", "")))
        try:
            return render_chat(
                self.chat_template, messages, add_generation_prompt=True, **self.special_tokens
            )[0]
        # A template is a program of the package's: it may divide by zero or recurse for ever.
        except Exception as error:
            raise InputError(
                f"the chat template refuses these messages: {' '.join(str(error).split())}",
                hint="check the order and the roles of the messages",
                param="messages",
            ) from None

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of some tokens without special ones: what a detokenizer's pieces add up to."""
        pieces = self.detokenizer()
        return pieces.push(token_ids) + pieces.flush()

    def token_text(self, token_id: int) -> str:
        """A token as it stands within a text, special or not: 'the' differs from ' the'.

        Half a character is shown as U+FFFD.
        """
        # Decoders strip the space before a first word, so there is another one before it.
        before = self._marked.decode(self._anchor, skip_special_tokens=False)
        both = self._marked.decode([*self._anchor, token_id], skip_special_tokens=False)
        return str(both[len(before) :])

    def detokenizer(self) -> IncrementalDetokenizer:
        """A fresh detokenizer for one answer."""
        return IncrementalDetokenizer(
            lambda ids: str(self._marked.decode(list(ids), skip_special_tokens=True))
        )

    @functools.cached_property
    def longest_token(self) -> int:
        """Characters of the longest token, so that many tokens hold at most as many times more."""
        return max(map(len, self._plain.get_vocab(with_added_tokens=True)), default=1)

    @functools.cached_property
    def _anchor(self) -> list[int]:
        return list(self._plain.encode("a", add_special_tokens=False).ids)

    @property
    def vocab_size(self) -> int:
        return int(self._marked.get_vocab_size(with_added_tokens=True))

    def _special_contents(self) -> list[str]:
        added = self._marked.get_added_tokens_decoder().values()
        return [token.content for token in added if token.special]


class IncrementalDetokenizer:
    """Turns tokens into text as they come, never splitting a character.

    The pieces of `push` and the last one of `flush` add up to the text of all tokens.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        """Tokens of the last finished piece, which decoders need as context, and those after it."""
        self._context_length = 0
        self._emitted = ""
        """How much of the window's text is out already."""

    def push(self, token_ids: Iterable[int]) -> str:
        """Text that these tokens complete; may be empty while a character is unfinished."""
        pieces = [self._push_one(token_id) for token_id in token_ids]
        return "".join(pieces)

    def flush(self) -> str:
        """What is left at the end of the answer, an unfinished character included."""
        text = self._decode(self._window)
        rest = text[len(self._emitted) :]
        self._emitted = text
        return rest

    def _push_one(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._decode(self._window)
        tail = len(text) - len(text.rstrip(_REPLACEMENT))
        stable_length = len(text) - min(tail, _MAX_HELD_REPLACEMENTS)
        piece = text[len(self._emitted) : stable_length]
        if stable_length > len(self._emitted):
            self._emitted = text[:stable_length]
        if tail == 0 and piece:
            self._shift()
        elif tail == 0 and len(self._window) > _MAX_WINDOW_TOKENS:
            self._window.pop()  # a long run of tokens without text must not slow the others
        elif len(self._window) % _MAX_WINDOW_TOKENS == 0:
            self._shorten(text[len(self._emitted) :])
        return piece

    def _shorten(self, held: str) -> None:
        """Forget all but the last tokens of a long run that makes no character, where those show
        as much of it that is held back."""
        kept = self._window[-_KEPT_WINDOW_TOKENS:]
        text = self._decode(kept)
        if text.endswith(held):
            self._window, self._context_length = kept, 0
            self._emitted = text[: len(text) - len(held)]

    def _shift(self) -> None:
        """Forget all but the tokens of the piece just finished."""
        del self._window[: self._context_length]
        self._context_length = len(self._window)
        self._emitted = self._decode(self._window)


class StopStrings:
    """Ends a text before the first stop string, however tokens cut it.

    Text is held back only while it may still be the beginning of a stop string. The stop string
    that is complete first wins, so the outcome does not depend on how the text was cut.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._followers = [_Follower(stop) for stop in stops if stop]
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Text that is safe to release; nothing once a stop string has matched."""
        if self.matched is not None:
            return ""
        if not self._followers:
            return text
        buffer = self._held + text
        for end, character in enumerate(text, start=len(self._held) + 1):
            complete = [f.stop for f in self._followers if f.is_complete_with(character)]
            if complete:
                self.matched = max(complete, key=len)
                self._held = ""
                return buffer[: end - len(self.matched)]
        keep = max(follower.length for follower in self._followers)
        self._held = buffer[len(buffer) - keep :]
        return buffer[: len(buffer) - keep]

    def flush(self) -> str:
        """What was held back, now that no more text comes."""
        rest, self._held = self._held, ""
        return rest


class _Follower:
    """How much of a stop string a text ends with, at a cost that does not depend on its length
    (Knuth, Morris and Pratt, 1977)."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.length = 0
        """Characters of the stop string that the text ends with."""
        self._shorter = [0]
        """By length, less one: the next shorter beginning that is an end as well."""
        for character in stop[1:]:
            self._shorter.append(self._longer(self._shorter[-1], character))

    def is_complete_with(self, character: str) -> bool:
        """Take one more character; never more than completes the stop string."""
        self.length = self._longer(self.length, character)
        return self.length == len(self.stop)

    def _longer(self, length: int, character: str) -> int:
        while length and self.stop[length] != character:
            length = self._shorter[length - 1]
        return length + (self.stop[length] == character)


class SpecialTokenGuard:
    """Hides special tokens in message contents from the tokenizer, by marks no user can guess."""

    def __init__(self, special_tokens: Sequence[str]) -> None:
        # Where one begins like another, the longer one is meant.
        self._tokens = tuple(sorted(special_tokens, key=len, reverse=True))
        self._numbers = {token: number for number, token in enumerate(self._tokens)}
        self._mark = f"\ue000{secrets.token_hex(8)}:"

    def hide(self, message: Mapping[str, Any]) -> dict[str, Any]:
        return {key: self._hide_value(value) for key, value in message.items()}

    def _hide_value(self, value: Any) -> Any:
        if not isinstance(value, str) or not self._tokens:
            return value
        return _any_of(self._tokens).sub(lambda match: self.mark_of(match[0]), value)

    def mark_of(self, token: str) -> str:
        """What stands for a special token in a rendered text."""
        return f"{self._mark}{self._numbers[token]}\ue001"

    def split(self, rendered: str) -> list[tuple[str, bool]]:
        """Pieces of the rendered text; True where a piece is a user's special token."""
        first, *rest = rendered.split(self._mark)
        pieces = [(first, False)]
        for part in rest:
            number, end, after = part.partition("\ue001")
            if end and number.isdecimal():
                pieces += [(self._tokens[int(number)], True), (after, False)]
            else:  # the template cut it off
                pieces.append((self._mark + part, False))
        return [piece for piece in pieces if piece[0]]


@functools.lru_cache(maxsize=32)
def _any_of(tokens: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, tokens)))


def _checked(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"the text has a lone surrogate at character {error.start}, expected valid Unicode",
            hint="send complete UTF-8 characters",
        ) from None
    return text


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    values = json.loads(path.read_text(encoding="utf-8"))
    return values if isinstance(values, dict) else {}


def _find_template(model_dir: Path, config: Mapping[str, Any]) -> str | None:
    file = model_dir / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several named templates; transformers' default is 'default'
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    tokens: dict[str, str] = {}
    for name in ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token"):
        value = config.get(name)
        if isinstance(value, dict):  # a serialised AddedToken
            value = value.get("content")
        if isinstance(value, str):
            tokens[name] = value
    return tokens
