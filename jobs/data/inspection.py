"""A quick look at a source: that it can be read as the config says, without reading all of it.

It knows nothing about storage or splits.

    for line in inspect(config): print(line)
    vocab_size = expected_vocab_size(config)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from jobs.data.chat import check_chat_template, make_chat_encoder
from jobs.data.config import BpeTokenizer, CharacterTokenizer, DataConfig
from jobs.data.corpus import existing_tokenizer, plan_corpus
from jobs.data.documents import Document, batched, measure
from jobs.data.preparation import read_numbers
from jobs.data.shards import Plan, read_shard
from jobs.data.tokenizing import make_encoder


def inspect(config: DataConfig) -> Iterator[str]:
    """Of text: lists the files, reads the first documents and, if there is one, tries the
    tokenizer on them. Tables and arrays are read whole.

    Raises:
        InputError: what preparing the dataset would raise for these.
    """
    if config.kind != "text":
        yield f"source has digest sha256:{read_numbers(config).digest}"
        return
    plan = plan_corpus(config)
    size = f"files {len(plan.files):,}, {plan.size_bytes / 1e6:,.1f} MB"
    yield f"source '{config.source.kind}': {size}"
    documents = _first_documents(config, plan)
    size_bytes = sum(measure(document).size_bytes for document in documents)
    line = f"the first {len(documents):,} documents hold {size_bytes:,} bytes"
    num_tokens = _num_tokens(config, documents)
    yield f"{line} in {num_tokens:,} tokens" if num_tokens else line


def expected_vocab_size(config: DataConfig) -> int:
    """What the dataset's vocabulary will be, or close to it, without reading the corpus."""
    tokenizer = config.text.tokenizer
    if isinstance(tokenizer, BpeTokenizer):
        return tokenizer.vocab_size
    if isinstance(tokenizer, CharacterTokenizer):
        # Those of the beginning, which are nearly all, and the end token.
        seen = set(tokenizer.more)
        for document in _first_documents(config, plan_corpus(config)):
            seen |= set(document.text)
        return len(seen) + 1
    files = existing_tokenizer(config)
    assert files is not None
    if config.is_chat:
        check_chat_template(files)
    return files.vocab_size


def _first_documents(config: DataConfig, plan: Plan) -> list[Document]:
    shards = itertools.chain.from_iterable(
        read_shard(config.source_of_text, shard) for shard in plan.shards
    )
    return next(batched(shards, lambda document: document.num_characters), [])


def _num_tokens(config: DataConfig, documents: list[Document]) -> int:
    files = existing_tokenizer(config)
    if files is None:
        return 0
    if not config.is_chat:
        texts = [document.text for document in documents]
        return sum(len(ids) for ids in make_encoder(files).encode(texts))
    encoder = make_chat_encoder(files)
    conversations = ((d.content, d.locate) for d in documents if not isinstance(d.content, str))
    return sum(len(encoder.encode(content, locate)[0]) for content, locate in conversations)
