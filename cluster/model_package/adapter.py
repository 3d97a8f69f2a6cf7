"""A LoRA adapter: is it whole and harmless, and what does its base become with it.

Loads torch, transformers and peft inside its functions; knows nothing of signing and storage. Both
directories must have been verified, or be one's own: only local files are read.

    model = load_merged(base.model_dir, adapter.model_dir)
    parity = merge_into(Path("whole"), base.model_dir, adapter.model_dir, ["Once upon a time"])
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.errors import MissingFileError, PackageError
from cluster.model_package.files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    TOKENIZER,
    refuse_code_references,
)
from cluster.model_package.language_model import (
    describe_language_model,
    encode_prompts,
    load_reference,
    one_line,
    quiet,
)
from cluster.model_package.parity import RELATIVE_TOLERANCES, certify, token_logits

_HINT = "it must load on its base with peft's PeftModel, from local files"
_GENERATION = "generation_config.json"
# The rest (tokenizer, template, end tokens) is the merged model's too.
_OF_THE_ADAPTER = frozenset({ADAPTER_CONFIG, ADAPTER_WEIGHTS, "README.md"})


def check_adapter(directory: Path) -> None:
    """Raises PackageError if it is not a LoRA adapter with its weights and its tokenizer."""
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, TOKENIZER):
        if not (directory / name).is_file():
            raise MissingFileError(
                f"the adapter directory has no {name}",
                hint="save it with peft's model.save_pretrained(DIR), and its tokenizer with "
                "tokenizer.save_pretrained(DIR)",
            )
    refuse_code_references(directory, [ADAPTER_CONFIG])
    kind = json.loads((directory / ADAPTER_CONFIG).read_bytes()).get("peft_type")
    if kind != "LORA":
        raise PackageError(
            f"the adapter is of peft_type {kind!r}, expected 'LORA'",
            hint="merge it into its base (peft: model.merge_and_unload()) and import that",
        )


def load_adapted(base_dir: Path, adapter_dir: Path) -> Any:
    """The base with the adapter beside it, in fp32 on the CPU, ready to evaluate.

    Raises:
        PackageError: the adapter is not whole, or belongs to another base.
    """
    check_adapter(adapter_dir)
    model = load_reference(base_dir)
    with one_line("the adapter cannot be loaded", hint=_HINT), quiet():
        from peft import PeftModel, get_peft_model_state_dict
        from safetensors import safe_open
        from transformers import GenerationConfig

        adapted = PeftModel.from_pretrained(model, str(adapter_dir), torch_device="cpu")
        with safe_open(adapter_dir / ADAPTER_WEIGHTS, framework="pt") as weights:
            missing = get_peft_model_state_dict(adapted).keys() ^ set(weights.keys())
        if (adapter_dir / _GENERATION).is_file():
            model.generation_config = GenerationConfig.from_pretrained(adapter_dir)
    if missing:
        raise PackageError(
            f"the adapter and its base differ in '{min(missing)}' and {len(missing) - 1} others",
            hint="use the base that it was trained on",
        )
    return adapted.eval()


def load_merged(base_dir: Path, adapter_dir: Path) -> Any:
    """The base with the adapter's matrices added to its own: a plain transformers model.

    Raises:
        PackageError: see `load_adapted`.
    """
    return _merge(load_adapted(base_dir, adapter_dir))


def merge_into(
    target: Path,
    base_dir: Path,
    adapter_dir: Path,
    prompts: Sequence[str],
    relative_tolerance: float = RELATIVE_TOLERANCES["merge"],
) -> dict[str, float]:
    """Write the merged model to an empty directory; its parity certificate, see `certify`.

    Raises:
        ParityError: it is not the adapter with its base; nothing is written then.
    """
    adapted = load_adapted(base_dir, adapter_dir)
    info = describe_language_model(adapter_dir, adapted.get_base_model())
    ids = encode_prompts(adapter_dir, prompts, info.max_context_tokens)
    before = token_logits(adapted, ids)
    merged = _merge(adapted)
    parity = certify(before, token_logits(merged, ids), relative_tolerance)
    with one_line("the merged model cannot be saved", hint=_HINT), quiet():
        merged.save_pretrained(target)
    for path in sorted(adapter_dir.iterdir()):
        if path.name not in _OF_THE_ADAPTER:
            shutil.copyfile(path, target / path.name)
    return parity


def _merge(adapted: Any) -> Any:
    with one_line("the adapter cannot be merged", hint=_HINT), quiet():
        return adapted.merge_and_unload(safe_merge=True).eval()
