"""A LoRA adapter: is it whole and harmless, and what does its base become with it.

Loads torch, transformers and peft inside its functions; knows nothing of signing and storage. Both
directories must have been verified, or be one's own: only local files are read.

    model = load_merged(base.model_dir, adapter.model_dir)
    parity = merge_into(Path("whole"), base.model_dir, adapter.model_dir, ["Once upon a time"])
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cluster.errors import MissingFileError, PackageError, ParityError
from cluster.model_package.files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    TOKENIZER,
    refuse_code_references,
)
from cluster.model_package.golden import logit_tolerance
from cluster.model_package.language_model import (
    describe_language_model,
    encode_prompts,
    load_reference,
    one_line,
    quiet,
)

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
    target: Path, base_dir: Path, adapter_dir: Path, prompts: Sequence[str]
) -> dict[str, float]:
    """Write the merged model to an empty directory; how much its logits differ from the adapter's.

    Raises:
        ParityError: by more than rounding explains; nothing is written then.
    """
    import torch

    adapted = load_adapted(base_dir, adapter_dir)
    info = describe_language_model(adapter_dir, adapted.get_base_model())
    ids = [
        torch.tensor([row]) for row in encode_prompts(adapter_dir, prompts, info.max_context_tokens)
    ]
    before = list(_logits(adapted, ids))
    merged = _merge(adapted)
    pairs = zip(before, _logits(merged, ids), strict=True)
    difference = max(float((old - new).abs().max()) for old, new in pairs)
    tolerance = logit_tolerance([logits.numpy() for logits in before])
    if not difference <= tolerance:
        raise ParityError(
            f"merging changes logits by {difference:.3g}, expected at most {tolerance:.3g}",
            hint="its weights are too large to be added; package the adapter unmerged",
        )
    with one_line("the merged model cannot be saved", hint=_HINT), quiet():
        merged.save_pretrained(target)
    for path in sorted(adapter_dir.iterdir()):
        if path.name not in _OF_THE_ADAPTER:
            shutil.copyfile(path, target / path.name)
    return {"largest_difference": difference, "tolerance": tolerance}


def _merge(adapted: Any) -> Any:
    with one_line("the adapter cannot be merged", hint=_HINT), quiet():
        return adapted.merge_and_unload(safe_merge=True).eval()


def _logits(model: Any, prompts: Sequence[Any]) -> Iterator[Any]:
    import torch

    for ids in prompts:
        with torch.inference_mode():
            yield model(ids, use_cache=False).logits.float()
