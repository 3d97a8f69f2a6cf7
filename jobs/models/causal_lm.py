"""Family `causal_lm`: a Llama-shaped decoder, exported as a plain Hugging Face directory.

Shapes: B rows, T = sequence_length, V = vocabulary.

    family = CausalLm(config, DataShape.of(dataset.info))
    loss = family.loss(family.build(), {"tokens": tokens_BT1})
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cluster.errors import InputError
from jobs.data.dataset import DOCUMENT_STARTS, TOKENS, Dataset
from jobs.models.config import CausalLmConfig, LanguageModelConfig, Metric
from jobs.models.decoder import losses_by_token, prepare_decoder, summed_loss
from jobs.models.distillation import Teacher
from jobs.models.documents import document_positions
from jobs.models.family import Batch, DataShape, Exported
from jobs.models.text_export import copy_tokenizer, generation_config, golden_prompts
from jobs.models.weighting import ROW_WEIGHT, token_weights, unpack_bits


class LanguageModel:
    """Loss and metrics of any decoder that answers `model(input_ids).logits`."""

    unit = "tokens"
    metric_names: tuple[Metric, ...] = ("loss", "perplexity", "next_token_accuracy")

    def __init__(self, config: LanguageModelConfig, shape: DataShape) -> None:
        if not shape.vocab_size:
            raise InputError(
                "model.family 'causal_lm' needs text, and data.source holds arrays",
                hint="choose a text source, or model.family=cnn",
                param="model.family",
            )
        if config.mask_documents and DOCUMENT_STARTS not in shape.columns:
            raise InputError(
                "model.mask_documents needs to know where documents begin, and this dataset does "
                "not say",
                hint="delete it and run jobs.prepare again, or set model.mask_documents=false",
                param="model.mask_documents",
            )
        self._config = config
        self._shape = shape
        self._teacher = Teacher(config.distillation) if config.distillation else None
        self.units_per_row = shape.sequence_length

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        compute = summed_loss if self._teacher is None else self._teacher.loss
        return compute(model, *_split(batch), _weights(batch), **self._positions(batch))

    def num_units(self, batch: Batch) -> torch.Tensor:
        weights_BT = _weights(batch)
        if weights_BT is None:
            return torch.tensor(batch[TOKENS][:, 1:].numel(), dtype=torch.float64)
        return weights_BT.double().sum()

    def row_losses(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        losses_BT, _ = self._by_token(model, batch)
        unweighted = {name: column for name, column in batch.items() if name != ROW_WEIGHT}
        weights_BT = _weights(unweighted)
        if weights_BT is None:
            return losses_BT.mean(1)
        # Where nothing is predicted, nothing does harm.
        return (losses_BT * weights_BT).sum(1) / weights_BT.sum(1).clamp(min=1)

    def measure(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        losses_BT, correct_BT = (part.double() for part in self._by_token(model, batch))
        weights_BT = _weights(batch)
        if weights_BT is not None:
            losses_BT, correct_BT = losses_BT * weights_BT, correct_BT * weights_BT
        values = [losses_BT.sum(), correct_BT.sum(), self.num_units(batch)]
        return torch.stack([value.double().cpu() for value in values])

    def _by_token(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        return losses_by_token(model, *_split(batch), **self._positions(batch))

    def _positions(self, batch: Batch) -> dict[str, torch.Tensor]:
        """What keeps the documents of a row apart, if they are to be."""
        if not self._config.mask_documents:
            return {}
        starts_BT = unpack_bits(batch[DOCUMENT_STARTS], batch[TOKENS].shape[1])[:, :-1]
        return {"position_ids": document_positions(starts_BT)}

    def metrics(self, sums: torch.Tensor) -> dict[str, float]:
        loss, num_correct, num_tokens = sums.tolist()
        return language_metrics(loss, num_correct, num_tokens)


class CausalLm(LanguageModel):
    """A Llama with fresh weights; see `jobs.models.family.Family`."""

    def __init__(self, config: CausalLmConfig, shape: DataShape) -> None:
        super().__init__(config, shape)
        self._config: CausalLmConfig = config

    def build(self) -> torch.nn.Module:
        from transformers import LlamaForCausalLM

        model: torch.nn.Module = LlamaForCausalLM(self._llama_config())
        prepare_decoder(model, chunk_tokens=self._config.loss_chunk_tokens)
        return model

    def _llama_config(self) -> Any:
        from transformers import LlamaConfig

        config = self._config
        return LlamaConfig(
            vocab_size=self._shape.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_key_value_heads or config.num_heads,
            intermediate_size=config.feed_forward_size,
            max_position_embeddings=config.max_context_tokens or self._shape.sequence_length,
            tie_word_embeddings=config.tie_embeddings,
            bos_token_id=self._shape.end_id,
            eos_token_id=self._shape.end_id,
            pad_token_id=None,
            use_cache=False,
        )

    def export(self, model: Any, dataset: Dataset, directory: Path) -> Exported:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        # Generation needs what training does not.
        model.config.use_cache = True
        model.generation_config = generation_config(model, dataset)
        model.save_pretrained(directory)
        copy_tokenizer(dataset, directory)
        return Exported("language_model", directory, golden_prompts(dataset))


def _split(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """What a model reads, and what it is to predict."""
    tokens = batch[TOKENS].long()
    return tokens[:, :-1], tokens[:, 1:]


def _weights(batch: Batch) -> torch.Tensor | None:
    return token_weights(batch, batch[TOKENS].shape[1] - 1)


def language_metrics(loss: float, num_correct: float, num_tokens: float) -> dict[str, float]:
    """Means from sums over tokens; perplexity is kept finite for the first steps of a run."""
    mean = loss / num_tokens
    return {
        "loss": mean,
        "perplexity": float(torch.tensor(mean, dtype=torch.float64).clamp(max=50).exp()),
        "next_token_accuracy": num_correct / num_tokens,
    }
