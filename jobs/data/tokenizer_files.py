"""A tokenizer as the files that a Hugging Face directory has: made here, or taken as they are.

It knows nothing about datasets.

    files = read_tokenizer(ExistingTokenizer(kind="existing", path="models/llama"))
    files.write(directory)
    files.end_id, files.chat_template
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from cluster.errors import InputError
from jobs.data.config import ExistingTokenizer
from jobs.data.locations import join, read_location

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
_SPECIAL_FILE = "special_tokens_map.json"

_PARAM = "data.text.tokenizer.path"
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")


@dataclass(frozen=True)
class TokenizerFiles:
    """Contents by file name; may be sent to other processes."""

    contents: tuple[tuple[str, bytes], ...]
    name: str
    """As messages call it."""

    @classmethod
    def of(cls, contents: dict[str, bytes], name: str) -> TokenizerFiles:
        return cls(tuple(sorted(contents.items())), name)

    def get(self, file: str) -> bytes | None:
        return dict(self.contents).get(file)

    def write(self, directory: Path) -> None:
        directory.mkdir()
        for file, content in self.contents:
            (directory / file).write_bytes(content)

    @property
    def digest(self) -> str:
        parts = [hashlib.sha256(content).hexdigest() + name for name, content in self.contents]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenizerFiles, (self.contents, self.name)

    def load(self) -> Tokenizer:
        """A tokenizer of one's own, to set options of.

        Raises:
            InputError: `tokenizer.json` is not one.
        """
        try:
            tokenizer = Tokenizer.from_str((self.get(TOKENIZER_FILE) or b"").decode("utf-8"))
        except Exception as error:  # tokenizers raises bare Exception
            raise InputError(
                f"'{self.name}' has a {TOKENIZER_FILE} that is not one: {error}",
                hint="save the tokenizer again with save_pretrained",
                param=_PARAM,
            ) from None
        # Training leaves these in the file; they would cut and pad documents.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self._vocab.values()) + 1

    @property
    def end_id(self) -> int:
        """Raises InputError if the tokenizer names no end of text."""
        return self._id_of("eos_token")

    @property
    def pad_id(self) -> int:
        return self._id_of("pad_token" if "pad_token" in self.special_tokens else "eos_token")

    @functools.cached_property
    def special_tokens(self) -> dict[str, str]:
        """By role, as chat templates name them."""
        found = {**self._json(_SPECIAL_FILE), **self._json(CONFIG_FILE)}
        tokens: dict[str, str] = {}
        for name in _SPECIAL_NAMES:
            value = found.get(name)
            if isinstance(value, dict):  # a serialised AddedToken
                value = value.get("content")
            if isinstance(value, str):
                tokens[name] = value
        return tokens

    @property
    def chat_template(self) -> str:
        """Empty if there is none."""
        file = self.get(TEMPLATE_FILE)
        if file is not None:
            return _as_text(file, f"{self.name}/{TEMPLATE_FILE}", _PARAM)
        template = self._json(CONFIG_FILE).get("chat_template")
        if isinstance(template, list):  # several named templates; 'default' is the default
            named = [entry for entry in template if isinstance(entry, dict)]
            template = next((e.get("template") for e in named if e.get("name") == "default"), None)
        return template if isinstance(template, str) else ""

    def check_end(self) -> None:
        """Raises InputError if the tokenizer names no end of text."""
        self._id_of("eos_token")

    def check_no_code(self) -> None:
        """Raises InputError if the tokenizer would have code of its own run."""
        if "auto_map" in self._json(CONFIG_FILE):
            raise InputError(
                f"'{self.name}' asks for code of its own to be run ('auto_map' in {CONFIG_FILE})",
                hint="use a tokenizer that transformers has a class for",
                param=_PARAM,
            )

    def _id_of(self, role: str) -> int:
        token = self.special_tokens.get(role)
        if token is None or token not in self._vocab:
            raise InputError(
                f"'{self.name}' names no {role} that it knows",
                hint=f"set {role} in its {CONFIG_FILE}",
                param=_PARAM,
            )
        return self._vocab[token]

    @functools.cached_property
    def _vocab(self) -> dict[str, int]:
        return dict(self.load().get_vocab(with_added_tokens=True))

    def _json(self, file: str) -> dict[str, Any]:
        content = self.get(file)
        if content is None:
            return {}
        try:
            values = json.loads(content)
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):
            raise InputError(
                f"'{self.name}' has a {file} that is no JSON object",
                hint="save the tokenizer again with save_pretrained",
                param=_PARAM,
            )
        return values


def read_tokenizer(config: ExistingTokenizer) -> TokenizerFiles:
    """Only files of data are read; code beside them is not.

    Raises:
        InputError: it is not there, not a fast tokenizer, or asks for code of its own.
    """
    name = config.path.partition("?")[0]
    contents: dict[str, bytes] = {}
    for file in (TOKENIZER_FILE, CONFIG_FILE, _SPECIAL_FILE, TEMPLATE_FILE):
        content = read_location(join(config.path, file), _PARAM, is_optional=True)
        if content is not None:
            contents[file] = content
    if TOKENIZER_FILE not in contents:
        raise InputError(
            f"'{name}' has no {TOKENIZER_FILE}",
            hint="give a directory that a fast tokenizer was saved to with save_pretrained",
            param=_PARAM,
        )
    if config.chat_template is not None:
        param = "data.text.tokenizer.chat_template"
        contents[TEMPLATE_FILE] = read_location(config.chat_template, param) or b""
        _as_text(contents[TEMPLATE_FILE], config.chat_template.partition("?")[0], param)
    files = TokenizerFiles.of(contents, name)
    files.check_no_code()
    files.load()
    return files


def _as_text(content: bytes, file: str, param: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"chat template '{file}' is not UTF-8 text (byte {error.start})",
            hint="convert it to UTF-8, e.g. with iconv",
            param=param,
        ) from None


def own_files(tokenizer: Tokenizer, end_token: str) -> TokenizerFiles:
    """Files of a tokenizer made here, whose texts begin and end with one token."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end_token,
        "eos_token": end_token,
        "clean_up_tokenization_spaces": False,
    }
    contents = {
        TOKENIZER_FILE: tokenizer.to_str(pretty=True).encode(),
        CONFIG_FILE: json.dumps(settings, indent=2).encode() + b"\n",
    }
    return TokenizerFiles.of(contents, "the tokenizer made here")
