"""Family `causal_lm`, going on from the weights of a base: all of them, or LoRA beside them.

Its `base` is a local directory that `jobs.models.bases` has found safe to load. Any decoder of
transformers will do that answers `model(input_ids).logits`: Llama, Qwen, Mistral and others.

    family = PretrainedLm(config.model_copy(update={"base": str(base.directory)}), shape)
    family.export(family.build(), dataset, directory)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cluster.errors import InputError
from cluster.model_package.language_model import load_weights, one_line
from jobs.data.dataset import Dataset
from jobs.models.causal_lm import LanguageModel
from jobs.models.config import PretrainedLmConfig
from jobs.models.decoder import prepare_decoder
from jobs.models.family import DataShape, Exported
from jobs.models.lora import add_lora, save_adapter
from jobs.models.sparsity import keep_zeros
from jobs.models.text_export import copy_tokenizer, generation_config, golden_prompts


class PretrainedLm(LanguageModel):
    """See `jobs.models.family.Family`."""

    def __init__(self, config: PretrainedLmConfig, shape: DataShape) -> None:
        super().__init__(config, shape)
        self._base = Path(config.base)
        self._lora = config.lora
        self._keep_zeros = config.keep_zeros
        self._hugging_face_config = _read_config(self._base)
        _check_shape(self._hugging_face_config.get_text_config(), shape)

    def build(self) -> torch.nn.Module:
        """The base; on torch's default device 'meta' it has its shape alone."""
        on_meta = torch.get_default_device().type == "meta"
        model = _shape_of(self._hugging_face_config) if on_meta else load_weights(self._base)
        model.config.use_cache = False
        if self._lora is not None:
            add_lora(model, self._lora)
        if self._keep_zeros:
            keep_zeros(model)
        prepare_decoder(model, chunk_tokens=self._config.loss_chunk_tokens)
        trained: torch.nn.Module = model
        return trained

    def export(self, model: Any, dataset: Dataset, directory: Path) -> Exported:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        prompts = golden_prompts(dataset)
        generation = generation_config(model, dataset)
        if self._lora is not None:
            save_adapter(model, directory)
            generation.save_pretrained(directory)
            copy_tokenizer(dataset, directory)
            return Exported("adapter", directory, prompts)
        # Generation needs what training does not.
        model.config.use_cache = True
        model.generation_config = generation
        model.save_pretrained(directory)
        copy_tokenizer(dataset, directory)
        return Exported("language_model", directory, prompts)


def _read_config(directory: Path) -> Any:
    from transformers import AutoConfig

    with one_line("model.base: its config.json cannot be read"):
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


def _shape_of(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    with one_line("model.base: transformers cannot make this model"):
        return AutoModelForCausalLM.from_config(
            config, trust_remote_code=False, dtype=torch.float32
        )


def _check_shape(config: Any, shape: DataShape) -> None:
    if shape.vocab_size > config.vocab_size:
        raise InputError(
            f"the dataset's tokenizer has {shape.vocab_size} tokens, and model.base knows "
            f"{config.vocab_size}",
            hint="set data.text.tokenizer to {kind: existing, path: BASE}, with that of model.base",
            param="data.text.tokenizer",
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions and shape.sequence_length > positions:
        raise InputError(
            f"data.text.sequence_length is {shape.sequence_length}, and model.base holds "
            f"{positions} tokens",
            hint=f"set data.text.sequence_length to {positions} or less",
            param="data.text.sequence_length",
        )
