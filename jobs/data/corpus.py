"""A corpus: what a text source holds, known by its index, and the dataset that it becomes.

Two passes over the source, three if a tokenizer is learnt; of the text, only what is being worked
on is held. It knows nothing about storage, and not where its tasks run.

    corpus = read_corpus(config, in_process, print)
    text_info, columns = corpus.write(directory)
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import InputError
from jobs.data.chat import make_chat_encoder
from jobs.data.config import DataConfig, ExistingTokenizer
from jobs.data.dataset import TOKENIZER_DIR, TextInfo, shown_reasons
from jobs.data.encoding import EncodeJob, EncodeTask, encode_shard
from jobs.data.execution import Executor
from jobs.data.index import LEFT_OUT, Fates, Index, choose, make_index
from jobs.data.progress import Progress
from jobs.data.shards import Plan, plan_shards
from jobs.data.splits import SPLITS
from jobs.data.token_writer import TokenWriter, Written
from jobs.data.tokenizer_files import TokenizerFiles, read_tokenizer
from jobs.data.vocabulary import make_tokenizer

Say = Callable[[str], None]


@dataclass(frozen=True)
class Corpus:
    """A source that has been read once."""

    config: DataConfig
    plan: Plan
    index: Index
    tokenizer: TokenizerFiles | None
    """An existing one."""
    execute: Executor
    say: Say

    @property
    def digest(self) -> str:
        """Of all that the dataset is made from."""
        if self.tokenizer is None:
            return self.index.digest
        return hashlib.sha256(f"{self.index.digest} {self.tokenizer.digest}".encode()).hexdigest()

    def write(self, directory: Path) -> TextInfo:
        """Fill an existing, empty directory with rows and the tokenizer.

        Raises:
            InputError: a split that was asked for has no row.
        """
        fates, left_out = choose(self.index, self.config)
        _check_fates(fates, self.config)
        files = self.tokenizer or make_tokenizer(
            self.config, self.plan, self.index, fates, self.execute, self._progress
        )
        files.write(directory / TOKENIZER_DIR)
        written = self._encode(directory, files, fates)
        _check_rows(written, self.config)
        return self._info(files, written, left_out)

    def _encode(self, directory: Path, files: TokenizerFiles, fates: Fates) -> Written:
        text = self.config.text
        job = EncodeJob(
            source=self.config.source_of_text,
            splits=self.config.splits,
            files=files,
            vocab_size=files.vocab_size,
            by_character=text.tokenizer.kind == "characters",
            max_tokens=text.sequence_length + 1,
            long_conversations=text.long_conversations,
        )
        tasks = [
            EncodeTask(shard, fates[self.index.of_shard(number)], digest)
            for number, (shard, digest) in enumerate(
                zip(self.plan.shards, self.index.shard_digests, strict=True)
            )
        ]
        progress = self._progress("encoding", int(self.index.size_bytes[fates != LEFT_OUT].sum()))
        with TokenWriter.open(
            directory,
            sequence_length=text.sequence_length,
            vocab_size=files.vocab_size,
            pad_id=files.pad_id,
            is_chat=self.config.is_chat,
        ) as writer:
            for arrays in self.execute(functools.partial(encode_shard, job), tasks):
                writer.add(arrays)
                progress.add(
                    documents=len(arrays["splits"]),
                    size_bytes=int(arrays["bytes"][0]),
                    tokens=len(arrays["tokens"]),
                )
        return writer.written

    def _info(self, files: TokenizerFiles, written: Written, left_out: dict[str, int]) -> TextInfo:
        template = files.chat_template
        return TextInfo(
            tokenizer=self.config.text.tokenizer.kind,
            vocab_size=files.vocab_size,
            end_id=files.end_id,
            pad_id=files.pad_id,
            chat_template_sha256=hashlib.sha256(template.encode()).hexdigest() if template else "",
            sequence_length=self.config.text.sequence_length,
            has_loss_mask=self.config.is_chat,
            num_read=len(self.index),
            left_out={
                reason: count for reason, count in {**left_out, **written.left_out}.items() if count
            },
            num_cut=written.num_cut,
            num_documents=written.num_documents,
            num_tokens=written.num_tokens,
            unigram_entropy=written.unigram_entropy,
        )

    def _progress(self, doing: str, total_bytes: int) -> Progress:
        return Progress(doing, total_bytes=total_bytes, say=self.say)


def read_corpus(config: DataConfig, plan: Plan, execute: Executor, say: Say) -> Corpus:
    """Read everything once.

    Raises:
        InputError: the source or the tokenizer cannot be read.
    """
    tokenizer = existing_tokenizer(config)
    if config.is_chat and tokenizer is not None:
        make_chat_encoder(tokenizer)
    progress = Progress("reading", total_bytes=plan.size_bytes, say=say)
    index = make_index(config.source_of_text, plan.shards, execute, progress)
    return Corpus(config, plan, index, tokenizer, execute, say)


def existing_tokenizer(config: DataConfig) -> TokenizerFiles | None:
    """None where it is to be learnt."""
    tokenizer = config.text.tokenizer
    if not isinstance(tokenizer, ExistingTokenizer):
        return None
    files = read_tokenizer(tokenizer)
    files.check_end()
    return files


def plan_corpus(config: DataConfig) -> Plan:
    return plan_shards(config.source_of_text)


def _check_fates(fates: Fates, config: DataConfig) -> None:
    """Refuse before the work what cannot come out well."""
    if config.splits.by == "position":
        return
    for number, split in enumerate(SPLITS):
        if split in config.splits.wanted and not (fates == number).any():
            count = int((fates != LEFT_OUT).sum())
            raise InputError(
                f"split '{split}' is empty: {count} document(s) cannot be shared out whole",
                hint="set data.splits.by=position, or change data.splits",
                param="data.splits",
            )


def _check_rows(written: Written, config: DataConfig) -> None:
    for split in config.splits.wanted:
        if not written.num_documents[split] and (reasons := shown_reasons(written.left_out)):
            raise InputError(
                f"split '{split}' holds no conversation: all of its were left out ({reasons})",
                hint="no answer: give an assistant's turn within data.text.sequence_length, and a "
                "chat template that writes it; too many tokens: raise data.text.sequence_length, "
                "or set data.text.long_conversations=cut",
                param="data.source",
            )
        if not written.num_rows[split]:
            raise InputError(
                f"split '{split}' holds {written.num_tokens[split]} tokens, fewer than one row of "
                f"sequence_length + 1 = {config.text.sequence_length + 1}",
                hint="lower data.text.sequence_length or give more text",
                param="data.text.sequence_length",
            )
