"""Evaluate a language-model package: how well it predicts the tokens of a held-out split.

Text that was tokenised for another model is turned back into text and tokenised again, so any
causal language model can be measured on any text dataset.

    evaluate_language_model(package, dataset, config).metrics
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.nn import functional

from cluster.errors import InputError
from cluster.model_package import ModelPackage
from cluster.model_package.language_model import load_reference, load_tokenizer
from jobs.data.dataset import LOSS_MASK, TOKENIZER_FILE, TOKENS, Dataset
from jobs.data.packing import pack
from jobs.data.rows import Array
from jobs.evaluation.config import EvaluateConfig
from jobs.evaluation.evaluation import BatchClock, Evaluation, Values, require_finite
from jobs.evaluation.figures import row_loss_figure
from jobs.models.causal_lm import language_metrics


@torch.inference_mode()
def evaluate_language_model(
    package: ModelPackage,
    dataset: Dataset,
    config: EvaluateConfig,
    model: torch.nn.Module | None = None,
) -> Evaluation:
    """Loss in nats per token, perplexity, bits per byte of text, and how often the next token is
    the likeliest one.

    Args:
        model: with the package's tokenizer; None means the package's own.

    Raises:
        InputError: the dataset holds no text, too little for one row, or is to be sliced.
    """
    if config.slice_by:
        raise InputError(
            f"slice_by names '{config.slice_by}', and rows of text have no columns to slice by",
            hint="leave slice_by empty",
            param="slice_by",
        )
    torch.set_num_threads(config.num_threads)
    rows = _rows(package, dataset, config)
    model = model or load_reference(package.model_dir)
    clock = BatchClock()
    losses, hits = np.zeros(len(rows.tokens)), np.zeros(len(rows.tokens))
    for start in range(0, len(rows.tokens), config.batch_size):
        part = slice(start, start + config.batch_size)
        with clock.batch(len(rows.tokens[part])):
            losses[part], hits[part] = _measure(model, rows.tokens[part], rows.counts[part])
    return _evaluation(rows, losses, hits, clock, config)


@dataclass(frozen=True)
class _Rows:
    """Token ids [N, T + 1] in the model's own vocabulary, and which of them are predicted."""

    tokens: Array
    counts: Array
    """[N, T], 1 where the next token counts, else 0."""
    num_bytes: int
    """Of the text that the counted tokens stand for."""


def _measure(model: torch.nn.Module, tokens: Array, counts: Array) -> tuple[Values, Values]:
    """Summed loss and number of hits of each row."""
    batch = torch.from_numpy(tokens.astype(np.int64))
    weights = torch.from_numpy(counts.astype(np.float32))
    logits = model(batch[:, :-1], use_cache=False).logits.float()
    labels = batch[:, 1:]
    loss = functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    hits = (logits.argmax(-1) == labels).float()
    return (loss * weights).sum(1).double().numpy(), (hits * weights).sum(1).double().numpy()


def _evaluation(
    rows: _Rows, losses: Values, hits: Values, clock: BatchClock, config: EvaluateConfig
) -> Evaluation:
    num_tokens = rows.counts.sum(axis=1).astype(np.float64)
    counted = num_tokens > 0
    if not counted.any():
        raise InputError(
            f"split '{config.split}' has no token that is to be predicted",
            hint="choose another split, or data with longer answers",
            param="split",
        )
    require_finite("loss", losses)
    total = float(losses.sum())
    metrics = language_metrics(total, float(hits.sum()), float(num_tokens.sum()))
    if rows.num_bytes:
        metrics["bits_per_byte"] = total / math.log(2) / rows.num_bytes
    row_losses = losses[counted] / num_tokens[counted]
    return Evaluation(
        metrics=metrics,
        row_values={"loss": row_losses, "next_token_accuracy": hits[counted] / num_tokens[counted]},
        rows_digest=hashlib.sha256(rows.tokens[counted].astype("<i8").tobytes()).hexdigest(),
        ms_per_row=clock.ms_per_row,
        figures={"row_losses.png": row_loss_figure(row_losses)},
    )


def _rows(package: ModelPackage, dataset: Dataset, config: EvaluateConfig) -> _Rows:
    length = dataset.text.sequence_length
    rows = dataset.rows(config.split)
    columns = rows.read(np.arange(len(rows)))
    tokens = columns[TOKENS]
    counts = np.ones((len(tokens), length), dtype=np.uint8)
    if LOSS_MASK in columns:
        counts = np.unpackbits(columns[LOSS_MASK], axis=1, count=length + 1)[:, 1:]
    theirs = Tokenizer.from_file(str(dataset.tokenizer_path))
    counted = tokens[:, 1:][counts.astype(bool)]
    text = theirs.decode(counted.tolist(), skip_special_tokens=True)
    num_bytes = len(text.encode("utf-8"))
    if _split_alike(package.model_dir / TOKENIZER_FILE, dataset.tokenizer_path):
        return _Rows(tokens, counts, num_bytes)
    if LOSS_MASK in columns:
        raise InputError(
            f"dataset '{dataset.info.name}' was prepared with another tokenizer than the model's",
            hint="set data.text.tokenizer to the model's own",
            param="data.text.tokenizer",
        )
    tokenizer = load_tokenizer(package.model_dir)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)
    packed = pack(np.asarray(ids["input_ids"], dtype=np.int64), length, 2**32)
    if not len(packed):
        raise InputError(
            f"split '{config.split}' is {len(ids['input_ids'])} tokens to this model, fewer than "
            f"one row of {length + 1}",
            hint="lower data.text.sequence_length",
            param="data.text.sequence_length",
        )
    # Less than the whole text: its end may fill no row.
    text = tokenizer.decode(packed[:, 1:].reshape(-1).tolist(), skip_special_tokens=True)
    counts = np.ones((len(packed), length), dtype=np.uint8)
    return _Rows(packed, counts, len(text.encode("utf-8")))


def _split_alike(ours: Path, theirs: Path) -> bool:
    """Whether two tokenizer files give any text the same ids; their layout may differ."""
    if not ours.is_file():
        return False
    first, second = (json.loads(path.read_bytes()) for path in (ours, theirs))
    return all(first[part] == second[part] for part in ("model", "pre_tokenizer", "normalizer"))
