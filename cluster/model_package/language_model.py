"""A Hugging Face causal language model as the writer sees it: is it whole, and what is it.

Loads transformers and torch inside its functions; knows nothing of signing and storage. Only local
files are read and no code that comes with a model is run.

    model = load_reference(Path("my-model"))
    describe_language_model(Path("my-model"), model)
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cluster.errors import (
    HeliostatError,
    MissingFileError,
    PackageError,
    as_full_disk,
    first_line,
)
from cluster.model_package.files import list_files, refuse_code_references
from cluster.model_package.golden import MAX_NEW_TOKENS, MAX_PROMPT_TOKENS
from cluster.model_package.manifest import LanguageModelInfo

_HINT = (
    "it must load with transformers' AutoModelForCausalLM and AutoTokenizer, from local files and "
    "without remote code"
)
_PACKED = "compressed-tensors"
_UNLIMITED = 1_000_000
_DEFAULT_CONTEXT_TOKENS = 2048


def load_reference(model_dir: Path) -> Any:
    """The model in fp32 on the CPU, ready to evaluate.

    Raises:
        PackageError: no whole causal language model in safetensors lies there.
    """
    check_language_model_files(model_dir, list(list_files(model_dir)))
    return load_weights(model_dir).eval()


def check_language_model_files(model_dir: Path, names: Sequence[str]) -> None:
    """Raises PackageError if these files are no whole model, or name code to run."""
    _require_files(model_dir, names)
    refuse_code_references(model_dir, names)


def load_weights(model_dir: Path) -> Any:
    """The model in fp32 on the CPU, from a directory that has been checked.

    Safetensors are mapped into memory, so that no more than the model itself is held. Quantised
    weights become the floats that they stand for.

    Raises:
        PackageError: transformers cannot load it, or its weights are not whole.
    """
    from transformers import AutoModelForCausalLM

    with one_line("the model cannot be loaded"), quiet():
        model, report = AutoModelForCausalLM.from_pretrained(
            model_dir,
            config=hugging_face_config(model_dir),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype="float32",
            output_loading_info=True,
            # Else transformers refuses them with a report of many lines.
            ignore_mismatched_sizes=True,
        )
    if mismatched := sorted(report["mismatched_keys"]):
        name, found, expected = mismatched[0]
        raise PackageError(
            f"the model's weight '{name}' has shape {list(found)}, and its config.json says "
            f"{list(expected)}",
            hint="copy config.json and the weights from the same model",
        )
    if missing := sorted(report["missing_keys"]):
        raise PackageError(
            f"the model's weights lack '{missing[0]}' and {len(missing) - 1} others",
            hint="copy all safetensors shards, and save the model with its head",
        )
    if is_quantised(model.config):
        # It is a plain model now, and is to be saved as one.
        del model.config.quantization_config
    return model


def hugging_face_config(model_dir: Path) -> Any:
    """The model's configuration, by which `from_pretrained` gives a plain model of floats.

    Left to itself, it gives a quantised one whose weights are unpacked in its first call, and whose
    packed words count as parameters until then.

    Raises:
        PackageError: it cannot be read.
    """
    from transformers import AutoConfig

    with one_line("the model's config.json cannot be loaded"), quiet():
        config = AutoConfig.from_pretrained(
            model_dir, local_files_only=True, trust_remote_code=False
        )
    if is_quantised(config) and config.quantization_config["quant_method"] == _PACKED:
        config.quantization_config["dequantize"] = True
    return config


def is_quantised(config: Any) -> bool:
    """Whether a model with this configuration is stored quantised."""
    return getattr(config, "quantization_config", None) is not None


def load_tokenizer(model_dir: Path) -> Any:
    """The model's tokenizer.

    Raises:
        PackageError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    with one_line("the tokenizer cannot be loaded"), quiet():
        return AutoTokenizer.from_pretrained(
            model_dir, local_files_only=True, trust_remote_code=False
        )


def describe_language_model(model_dir: Path, model: Any) -> LanguageModelInfo:
    """What serving must know, from the configuration and the loaded weights."""
    tokenizer = load_tokenizer(model_dir)
    config = model.config.get_text_config()
    return LanguageModelInfo(
        architecture=type(model).__name__,
        max_context_tokens=_context_tokens(config, tokenizer),
        vocab_size=int(config.vocab_size),
        num_parameters=model.num_parameters(),
        eos_token_ids=_end_tokens(model, tokenizer),
        has_chat_template=bool(tokenizer.chat_template),
    )


def encode_prompts(
    model_dir: Path, texts: Sequence[str], max_context_tokens: int
) -> list[list[int]]:
    """Short golden prompts as token ids that leave room for their continuation."""
    tokenizer = load_tokenizer(model_dir)
    longest = max(1, min(MAX_PROMPT_TOKENS, max_context_tokens - MAX_NEW_TOKENS))
    prompts = [list(tokenizer(text)["input_ids"])[:longest] for text in texts]
    if not any(prompts):
        raise PackageError(
            f"the tokenizer makes no tokens of {texts[0]!r}",
            hint="save the tokenizer that belongs to the model",
        )
    return [prompt for prompt in prompts if prompt]


def _require_files(model_dir: Path, names: Sequence[str]) -> None:
    if "config.json" not in names:
        raise MissingFileError(
            "the model directory has no config.json",
            hint="point to a directory written by save_pretrained of a causal language model",
        )
    if not any(name.endswith(".safetensors") for name in names):
        raise MissingFileError(
            "the model directory has no safetensors weights",
            hint="save them with model.save_pretrained(DIR, safe_serialization=True)",
        )
    tokenizers = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
    if not any(name in tokenizers for name in names):
        raise MissingFileError(
            "the model directory has no tokenizer",
            hint="add it with tokenizer.save_pretrained(DIR)",
        )
    if "model.safetensors.index.json" in names:
        _require_shards(model_dir, names)


def _require_shards(model_dir: Path, names: Sequence[str]) -> None:
    index = "model.safetensors.index.json"
    try:
        shards = {*json.loads((model_dir / index).read_bytes())["weight_map"].values()}
        if not all(isinstance(shard, str) for shard in shards):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise PackageError(f"'{index}' is not an index of shards", hint="copy it again") from None
    if missing := sorted(shards - set(names)):
        raise MissingFileError(
            f"the model directory lacks the weights '{missing[0]}'", hint="copy all shards"
        )


def _context_tokens(config: Any, tokenizer: Any) -> int:
    declared = getattr(config, "max_position_embeddings", None)
    if isinstance(declared, int) and declared > 0:
        return declared
    if 0 < tokenizer.model_max_length < _UNLIMITED:
        return int(tokenizer.model_max_length)
    return _DEFAULT_CONTEXT_TOKENS


def _end_tokens(model: Any, tokenizer: Any) -> tuple[int, ...]:
    declared = [
        model.generation_config.eos_token_id if model.can_generate() else None,
        model.config.get_text_config().eos_token_id,
        tokenizer.eos_token_id,
    ]
    for ids in declared:
        if ids is not None:
            return tuple(ids) if isinstance(ids, list | tuple) else (int(ids),)
    return ()


@contextlib.contextmanager
def one_line(what: str, hint: str = _HINT) -> Iterator[None]:
    """transformers raises many types with long texts; a user needs the first sentence."""
    try:
        yield
    except HeliostatError:
        raise
    except Exception as error:
        if (full := as_full_disk(error)) is not None:
            raise full from None
        raise PackageError(f"{what}: {first_line(error)}", hint=hint) from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' warnings and progress bars."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
