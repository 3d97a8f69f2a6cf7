"""Splitting, tokenising and packing text."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors

from cluster.errors import InputError
from jobs.data.config import SplitConfig
from jobs.data.packing import pack
from jobs.data.splits import SPLITS, cut_by_position, split_rows, split_weighted
from jobs.data.tokenizer_files import TokenizerFiles, own_files
from jobs.data.tokenizing import (
    END_OF_TEXT,
    character_tokenizer,
    make_encoder,
    train_bpe,
    unigram_cross_entropy,
)


@pytest.fixture(scope="module")
def files() -> TokenizerFiles:
    return train_bpe(["the cat sat on the mat\n" * 50], vocab_size=300)


@pytest.fixture(scope="module")
def tokenizer(files: TokenizerFiles) -> Tokenizer:
    return files.load()


@given(text=st.text(max_size=200))
def test_any_text_survives_encoding(files: TokenizerFiles, tokenizer: Tokenizer, text: str) -> None:
    (ids,) = make_encoder(files).encode([text])
    assert tokenizer.decode(ids[:-1].tolist(), skip_special_tokens=False) == text


def test_chinese_has_no_unknown_tokens(files: TokenizerFiles, tokenizer: Tokenizer) -> None:
    text = "定日镜随太阳转动,把光线始终投向同一目标。"
    (ids,) = make_encoder(files).encode([text])
    assert tokenizer.decode(ids[:-1].tolist()) == text
    assert None not in [tokenizer.id_to_token(i) for i in ids]


def test_the_name_of_a_special_token_in_a_document_is_plain_text(files: TokenizerFiles) -> None:
    (ids,) = make_encoder(files).encode([f"a{END_OF_TEXT}b"])
    assert ids.tolist().count(files.end_id) == 1
    assert ids[-1] == files.end_id


@given(text=st.text(alphabet="ab 阳\n", max_size=60))
def test_characters_are_encoded_alike_here_and_by_the_tokenizer(text: str) -> None:
    files = character_tokenizer("阳 ab\n")
    (ids,) = make_encoder(files, by_character=True).encode([text])
    tokenizer = files.load()
    assert ids[:-1].tolist() == tokenizer.encode(text).ids
    assert tokenizer.decode(ids[:-1].tolist()) == text
    assert files.vocab_size == 6


def test_an_unknown_character_is_refused_by_name() -> None:
    files = character_tokenizer("ab")
    with pytest.raises(InputError, match=r"character '阳' is held out.*tokenizer\.more"):
        make_encoder(files, by_character=True).encode(["ab", "a阳"])


def test_an_existing_tokenizer_keeps_what_it_adds_to_a_text(files: TokenizerFiles) -> None:
    begins, ends = files.load(), files.load()
    for tokenizer, shape in ((begins, "<s> $A"), (ends, "$A <|endoftext|>")):
        tokenizer.add_special_tokens(["<s>"])
        special = [(name, tokenizer.token_to_id(name)) for name in ("<s>", END_OF_TEXT)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=shape, special_tokens=special
        )
    begun, ended = (
        make_encoder(own_files(tokenizer, END_OF_TEXT)).encode(["the cat", ""])
        for tokenizer in (begins, ends)
    )
    plain = make_encoder(files).encode(["the cat", ""])
    start = begins.token_to_id("<s>")
    assert [ids.tolist() for ids in begun] == [[start, *ids.tolist()] for ids in plain]
    assert [ids.tolist() for ids in ended] == [ids.tolist() for ids in plain]


def test_a_long_text_is_encoded_in_pieces_and_loses_nothing(
    files: TokenizerFiles, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.data.tokenizing._PIECE_CHARACTERS", 100)
    text = "the cat\n\n  sat on 定日镜 the mat\n" * 50 + "x" * 250
    (ids,) = make_encoder(files).encode([text])
    assert tokenizer.decode(ids[:-1].tolist()) == text


@given(num_tokens=st.integers(0, 500), length=st.integers(1, 40))
def test_packing_predicts_every_token_once(num_tokens: int, length: int) -> None:
    ids = np.arange(num_tokens, dtype=np.int64)
    rows = pack(ids, length)
    predicted = rows[:, 1:].reshape(-1)
    assert np.array_equal(predicted, ids[1 : 1 + len(predicted)])
    assert num_tokens - 1 - len(predicted) < length
    assert np.array_equal(rows[:, :-1] + 1, rows[:, 1:])


def test_unigram_entropy_of_even_tokens_is_the_logarithm_of_their_number() -> None:
    counts = np.ones(64, dtype=np.int64)
    assert unigram_cross_entropy(counts, counts) == pytest.approx(np.log(64))


@given(
    num_rows=st.integers(0, 500),
    validation=st.floats(0, 0.4),
    test=st.floats(0, 0.4),
    seed=st.integers(0, 1000),
)
def test_every_row_is_in_one_split_of_the_share_asked_for(
    num_rows: int, validation: float, test: float, seed: int
) -> None:
    config = SplitConfig(validation=validation, test=test, seed=seed)
    ids = split_rows(num_rows, config)
    assert np.array_equal(np.sort(np.concatenate(list(ids.values()))), np.arange(num_rows))
    assert len(ids["test"]) == pytest.approx(test * num_rows, abs=1)
    assert len(ids["validation"]) == pytest.approx(validation * num_rows, abs=1)


def test_documents_are_shared_out_by_their_length() -> None:
    ids = split_weighted([1] * 90 + [10] * 9, SplitConfig(validation=0.2, test=0.2))
    weights = np.array([1] * 90 + [10] * 9)
    assert weights[ids["test"]].sum() == pytest.approx(36, abs=10)


@given(lines=st.lists(st.text(alphabet="ab ", max_size=10), max_size=50))
def test_cutting_by_position_keeps_every_character_and_whole_lines(lines: list[str]) -> None:
    text = "".join(line + "\n" for line in lines)
    pieces = cut_by_position(text, SplitConfig(validation=0.2, test=0.2))
    assert "".join(pieces[split] for split in SPLITS) == text
    assert all(not piece or piece.endswith("\n") for piece in pieces.values())
