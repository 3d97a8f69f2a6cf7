"""What a language model is exported with beside its weights: tokenizer, end tokens, golden prompts.

All of it is the dataset's: a model is served with the tokenizer and the chat template that it was
trained with, and its answers end where it has learnt to end them.

    copy_tokenizer(dataset, directory)
    model.generation_config = generation_config(model, dataset)
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from jobs.data.dataset import LOSS_MASK, TOKENS, Dataset

_NUM_GOLDEN_PROMPTS = 2
_GOLDEN_PROMPT_TOKENS = 6
_NUM_ROWS_SEARCHED = 256


def copy_tokenizer(dataset: Dataset, directory: Path) -> None:
    """The dataset's tokenizer files, as they are."""
    for path in sorted(dataset.tokenizer_dir.iterdir()):
        shutil.copyfile(path, directory / path.name)


def golden_prompts(dataset: Dataset) -> list[str]:
    """How the first training rows begin: text that the model has seen."""
    tokenizer = Tokenizer.from_file(str(dataset.tokenizer_path))
    rows = dataset.rows("train")
    ids = np.arange(min(_NUM_GOLDEN_PROMPTS, len(rows)))
    tokens = rows.read(ids)[TOKENS][:, 1 : 1 + _GOLDEN_PROMPT_TOKENS]
    return [tokenizer.decode(row.tolist()) for row in tokens]


def generation_config(model: Any, dataset: Dataset) -> Any:
    """The model's own, with every token that ends an answer."""
    from transformers import GenerationConfig

    config = model.generation_config
    ends = dict.fromkeys([dataset.text.end_id, *_learnt_ends(dataset), *_ids(config.eos_token_id)])
    try:
        config.validate(strict=True)
    except ValueError:
        # Some published ones contradict themselves, and cannot be saved.
        config = GenerationConfig(
            bos_token_id=config.bos_token_id, pad_token_id=config.pad_token_id
        )
    config.eos_token_id = list(ends) if len(ends) > 1 else dataset.text.end_id
    return config


def _ids(value: int | list[int] | None) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else value


def _learnt_ends(dataset: Dataset) -> Iterator[int]:
    """Special tokens among those that answers are made of: a chat template ends a turn with one."""
    if LOSS_MASK not in dataset.info.columns:
        return
    rows = dataset.rows("train")
    columns = rows.read(np.arange(min(_NUM_ROWS_SEARCHED, len(rows))))
    tokens = columns[TOKENS]
    predicted = np.unpackbits(columns[LOSS_MASK], axis=1)[:, : tokens.shape[1]].astype(bool)
    learnt = set(np.unique(tokens[predicted]).tolist())
    for token in json.loads(dataset.tokenizer_path.read_bytes())["added_tokens"]:
        if token["special"] and token["id"] in learnt:
            yield int(token["id"])
