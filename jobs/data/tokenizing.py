"""A byte-level BPE of our own: trained on the train split, able to encode any UTF-8.

All 256 bytes are in its alphabet, so no text has an unknown token. It knows nothing about files or
rows.

    tokenizer = train_tokenizer(texts, vocab_size=4096)
    encode_documents(tokenizer, ["你好", "hello"])     # one id array per document, end of text last
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn merges from `texts`; id 0 is the end-of-text token."""
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
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """As files that `transformers` loads."""
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    text = json.dumps(settings, indent=2)
    (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def encode_documents(tokenizer: Tokenizer, texts: Sequence[str]) -> list[npt.NDArray[np.int64]]:
    """Ids of each document, then end-of-text; that token's name in a text stays plain text."""
    tokenizer.encode_special_tokens = True
    end = tokenizer.token_to_id(END_OF_TEXT)
    encodings = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return [np.asarray([*encoding.ids, end], dtype=np.int64) for encoding in encodings]


def unigram_cross_entropy(
    train_ids: npt.NDArray[np.int64], held_out_ids: npt.NDArray[np.int64], vocab_size: int
) -> float:
    """Nats per token of predicting `held_out_ids` from the token frequencies of `train_ids` alone.

    Add-one smoothing keeps tokens that training never saw finite. A language model has learnt
    something beyond word frequencies once its loss is below this.
    """
    counts = np.bincount(train_ids, minlength=vocab_size).astype(np.float64) + 1.0
    log_probabilities = np.log(counts / counts.sum())
    return float(-log_probabilities[held_out_ids].mean())
