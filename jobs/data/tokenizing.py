"""Texts become token ids: by a byte-level BPE trained here, by characters, or by any tokenizer.

It knows nothing about files or rows.

    files = train_bpe(texts, vocab_size=4096)
    make_encoder(files).encode(["你好", "hello"])     # an id array each, the end token last
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from cluster.errors import InputError
from jobs.data.tokenizer_files import TOKENIZER_FILE, TokenizerFiles, own_files

END_OF_TEXT = "<|endoftext|>"
Ids = npt.NDArray[np.int64]

# A long text is encoded in pieces: its encoding takes a hundred times its length for a moment.
_PIECE_CHARACTERS = 1_000_000
_PROBE = ("one two\n", "three\nfour")


class Encoder(Protocol):
    """Makes ids of texts."""

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each, the end token last."""


def train_bpe(texts: Iterable[str], vocab_size: int) -> TokenizerFiles:
    """Learn merges from `texts`; id 0 is the end-of-text token.

    All 256 bytes are in its alphabet, so no text has an unknown token.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return own_files(tokenizer, END_OF_TEXT)


def character_tokenizer(characters: str) -> TokenizerFiles:
    """A token for each character, in order of code point; id 0 is the end-of-text token."""
    known = {END_OF_TEXT: 0, **{c: i for i, c in enumerate(sorted(set(characters)), start=1)}}
    # Without merges, a BPE is a table of characters.
    tokenizer = Tokenizer(models.BPE(vocab=known, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return own_files(tokenizer, END_OF_TEXT)


@functools.lru_cache(maxsize=2)
def make_encoder(files: TokenizerFiles, *, by_character: bool = False) -> Encoder:
    """`by_character` is faster, for what `character_tokenizer` made."""
    return CharacterEncoder(files) if by_character else TokenizerEncoder(files)


class TokenizerEncoder:
    """See `Encoder`. Names of special tokens in a text stay plain text."""

    def __init__(self, files: TokenizerFiles) -> None:
        self._tokenizer = files.load()
        self._tokenizer.encode_special_tokens = True
        self._end_id = files.end_id
        self._may_cut = may_cut(self._tokenizer)

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        if self._may_cut and any(len(text) > _PIECE_CHARACTERS for text in texts):
            return [self._encode_in_pieces(text) for text in texts]
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=True)
        return [self._ended(encoding.ids) for encoding in encodings]

    def _encode_in_pieces(self, text: str) -> Ids:
        ids: list[int] = []
        for number, piece in enumerate(cut_at_lines(text, _PIECE_CHARACTERS)):
            ids += self._tokenizer.encode(piece, add_special_tokens=number == 0).ids
        return self._ended(ids)

    def _ended(self, ids: list[int]) -> Ids:
        ends = [] if ids and ids[-1] == self._end_id else [self._end_id]
        return np.asarray([*ids, *ends], dtype=np.int64)


class CharacterEncoder:
    """See `Encoder`."""

    def __init__(self, files: TokenizerFiles) -> None:
        known = json.loads(files.get(TOKENIZER_FILE) or b"")["model"]["vocab"]
        self._end_id = files.end_id
        characters = {ord(name): number for name, number in known.items() if len(name) == 1}
        self._ids = np.full(max(characters, default=0) + 2, -1, dtype=np.int64)
        for code, number in characters.items():
            self._ids[code] = number

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Raises InputError for a character that is not in the vocabulary."""
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> Ids:
        codes = code_points(text)
        # Whatever lies beyond the table is as unknown as its last entry.
        ids = self._ids[np.minimum(codes, len(self._ids) - 1)]
        unknown = np.flatnonzero(ids < 0)
        if len(unknown):
            raise InputError(
                f"character {chr(codes[unknown[0]])!r} is held out but not in the train split, "
                "and so has no token",
                hint="add it to data.text.tokenizer.more, or use tokenizer kind bpe",
                param="data.text.tokenizer.more",
            )
        return np.append(ids, self._end_id)


def may_cut(tokenizer: Tokenizer) -> bool:
    """Whether texts may be encoded in pieces: some tokenizers add a blank or an end to each."""
    first, second = _PROBE
    pieces = tokenizer.encode(first).ids + tokenizer.encode(second, add_special_tokens=False).ids
    return bool(tokenizer.encode(first + second).ids == pieces)


def code_points(text: str) -> npt.NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)


def cut_at_lines(text: str, length: int) -> Iterable[str]:
    """Pieces of at most `length` characters, cut after the end of a line where there is one."""
    start = 0
    while start < len(text):
        end = start + length
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end


def unigram_cross_entropy(
    train_counts: npt.NDArray[np.int64], held_out_counts: npt.NDArray[np.int64]
) -> float:
    """Nats per held-out token when it is predicted from the train split's token counts alone.

    Add-one smoothing keeps tokens that training never saw finite. A language model has learnt
    something beyond word frequencies once its loss is below this.
    """
    if not held_out_counts.sum():
        return 0.0
    counts = train_counts.astype(np.float64) + 1.0
    log_probabilities = np.log(counts / counts.sum())
    return float(-(held_out_counts @ log_probabilities) / held_out_counts.sum())
