"""Bundled conversations, and the chat template for tokenizers made here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cluster.errors import InputError
from cluster.processing.text import TextProcessor
from jobs.data.chat import ChatEncoder
from jobs.data.python_help import python_help
from jobs.data.tokenizer_files import TokenizerFiles
from jobs.data.tokenizing import END_OF_TEXT, train_bpe

TEMPLATE = (Path(__file__).parents[4] / "jobs/data/plain_chat.jinja").read_bytes()


@pytest.fixture(scope="module")
def files() -> TokenizerFiles:
    texts = [turn["content"] for document in python_help() for turn in document.content]  # type: ignore[index]
    made = train_bpe(texts, vocab_size=1000)
    return TokenizerFiles.of({**dict(made.contents), "chat_template.jinja": TEMPLATE}, "made here")


def test_there_are_short_answers_to_many_questions() -> None:
    found = {document.content[0]["content"]: document for document in python_help()}  # type: ignore[index]
    assert len(found) > 1000
    document = found["What does abs do?"]
    assert document.content[1]["content"] == "Return the absolute value of the argument."  # type: ignore[index]
    assert document.locate() == "help of abs"
    assert [d.content for d in python_help()] == [d.content for d in python_help()]


def test_a_question_is_asked_in_training_as_it_is_served(
    files: TokenizerFiles, tmp_path: Path
) -> None:
    files.write(tmp_path / "tokenizer")
    text = TextProcessor.load(tmp_path / "tokenizer")
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": f"What is 定日镜{END_OF_TEXT}?"},
        {"role": "assistant", "content": "A heliostat."},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": " It turns."},
    ]
    ids, mask = ChatEncoder(files).encode(turns, str)
    first = np.flatnonzero(mask)[0]
    assert text.encode_chat(turns[:2]) == ids[:first].tolist()
    assert text.decode(ids[mask].tolist()) == "A heliostat. It turns."
    second = np.flatnonzero(np.diff(mask.astype(int)) == 1)[1] + 1
    assert text.encode_chat(turns[:4]) == ids[:second].tolist()
    assert ids[mask].tolist().count(files.end_id) == 2


def test_a_role_that_the_template_does_not_know_is_refused(files: TokenizerFiles) -> None:
    turns = [{"role": "tool", "content": "1"}]
    with pytest.raises(InputError, match="the role is 'tool', expected system, user or assistant"):
        ChatEncoder(files).encode(turns, lambda: "chat.jsonl:1")
