"""Evaluate a language-model package: how well it predicts the tokens of a held-out split.

Text that was tokenised for another model is turned back into text and tokenised again, so any
causal language model can be measured on any text dataset.

    metrics = evaluate_language_model(package, dataset, config)
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.nn import functional

from cluster.errors import InputError
from cluster.model_package import ModelPackage
from cluster.model_package.language_model import load_reference, load_tokenizer
from jobs.data.dataset import TOKENIZER_FILE, Dataset
from jobs.data.packing import pack
from jobs.data.rows import Array
from jobs.evaluation.config import EvaluateConfig
from jobs.models.causal_lm import language_metrics


@torch.inference_mode()
def evaluate_language_model(
    package: ModelPackage, dataset: Dataset, config: EvaluateConfig
) -> dict[str, float]:
    """Loss in nats per token, perplexity, and how often the next token is the likeliest one.

    Raises:
        InputError: the dataset holds no text, or too little for one row.
    """
    torch.set_num_threads(config.num_threads)
    tokens = _tokens(package, dataset, config)
    model = load_reference(package.model_dir)
    loss = num_correct = 0.0
    for start in range(0, len(tokens), config.batch_size):
        batch = torch.from_numpy(tokens[start : start + config.batch_size].astype(np.int64))
        logits = model(batch[:, :-1], use_cache=False).logits.float()
        labels = batch[:, 1:]
        loss += float(
            functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        )
        num_correct += float((logits.argmax(-1) == labels).sum())
    return language_metrics(loss, num_correct, tokens[:, 1:].size)


def _tokens(package: ModelPackage, dataset: Dataset, config: EvaluateConfig) -> Array:
    """Rows of token ids in the model's own vocabulary."""
    length = dataset.text.sequence_length
    rows = dataset.rows(config.split)
    tokens = rows.read(np.arange(len(rows)))["tokens"]
    if _split_alike(package.model_dir / TOKENIZER_FILE, dataset.tokenizer_path):
        return tokens
    # Rows overlap by one token.
    stream = np.concatenate([tokens[:1, :1].reshape(-1), tokens[:, 1:].reshape(-1)])
    text = Tokenizer.from_file(str(dataset.tokenizer_path)).decode(
        stream.tolist(), skip_special_tokens=True
    )
    ids = load_tokenizer(package.model_dir)(text, add_special_tokens=False, verbose=False)
    packed = pack(np.asarray(ids["input_ids"], dtype=np.int64), length, 2**32)
    if not len(packed):
        raise InputError(
            f"split '{config.split}' is {len(ids['input_ids'])} tokens to this model, fewer than "
            f"one row of {length + 1}",
            hint="lower data.text.sequence_length",
            param="data.text.sequence_length",
        )
    return packed


def _split_alike(ours: Path, theirs: Path) -> bool:
    """Whether two tokenizer files give any text the same ids; their layout may differ."""
    if not ours.is_file():
        return False
    first, second = (json.loads(path.read_bytes()) for path in (ours, theirs))
    return all(first[part] == second[part] for part in ("model", "pre_tokenizer", "normalizer"))
