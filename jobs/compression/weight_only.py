"""A language model's matrices in 8 or 4 bits, as a Hugging Face directory in compressed-tensors'
format: `transformers` and vLLM load it as it is.

Rounding to nearest with symmetric scales. Embeddings, norms and the head keep their precision. It
knows nothing of packages.

    quantise_weights(model_dir, stage, WeightOnlyConfig(method="int4_weights", group_size=32))
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from cluster.errors import InputError
from cluster.model_package.language_model import (
    hugging_face_config,
    is_quantised,
    load_reference,
    one_line,
    quiet,
)
from jobs.compression.config import WeightOnlyConfig

_HEAD = "lm_head"
_WEIGHTS = (".safetensors", ".safetensors.index.json")


def check_group_size(model_dir: Path, candidate: WeightOnlyConfig) -> None:
    """Without loading any weight: do the groups divide the rows of every matrix?

    Raises:
        InputError: they do not, or the model is quantised already.
    """
    from transformers import AutoModelForCausalLM

    config = hugging_face_config(model_dir)
    if is_quantised(config):
        raise InputError(
            "the model is quantised already", hint="compress the version that it was made from"
        )
    with torch.device("meta"), quiet():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    matrices = dict(_matrices(model))
    if not matrices:
        raise InputError(
            f"{type(model).__name__} has no linear layers to quantise",
            hint="compress it in another way",
        )
    for name, module in matrices.items():
        if candidate.group_size and module.in_features % candidate.group_size:
            raise InputError(
                f"group_size {candidate.group_size} does not divide the {module.in_features} "
                f"columns of '{name}'",
                hint="choose a smaller one, or null for one scale per row",
                param="group_size",
            )


def quantise_weights(
    model_dir: Path, target: Path, candidate: WeightOnlyConfig
) -> dict[str, str | int]:
    """Write the quantised model to an empty directory; what its manifest says of it.

    Raises:
        PackageError: the model cannot be loaded or saved.
    """
    import compressed_tensors
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import apply_quantization_config

    model = load_reference(model_dir)
    with one_line("the model cannot be quantised"), quiet(), _silent():
        apply_quantization_config(model, _scheme(candidate), show_progress=False)
        for _, module in _matrices(model):
            _set_scales(module)
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        model.save_pretrained(target)
        compressor.update_config(str(target))
    for path in sorted(model_dir.iterdir()):
        if not (target / path.name).exists() and not path.name.endswith(_WEIGHTS):
            shutil.copyfile(path, target / path.name)
    return {
        "method": candidate.method,
        "num_bits": candidate.num_bits,
        "group_size": candidate.group_size or 0,
        "format": "compressed-tensors pack-quantized",
        "library": f"compressed-tensors {compressed_tensors.__version__}",
    }


def _matrices(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Linear]]:
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] != _HEAD:
            yield name, module


def _scheme(candidate: WeightOnlyConfig) -> Any:
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
    )

    weights = QuantizationArgs(
        num_bits=candidate.num_bits,
        type="int",
        symmetric=True,
        strategy="group" if candidate.group_size else "channel",
        group_size=candidate.group_size,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format="pack-quantized")
    return QuantizationConfig(config_groups={"group_0": scheme}, ignore=[_HEAD])


def _set_scales(module: Any) -> None:
    """The scale of each group from its largest weight."""
    from compressed_tensors.quantization.utils import calculate_qparams

    args = module.quantization_scheme.weights
    groups = module.weight.detach().unflatten(-1, (-1, args.group_size or module.in_features))
    scales, zero_points = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    module.weight_scale.data.copy_(scales)
    module.weight_zero_point.data.copy_(zero_points)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """compressed-tensors draws progress bars that nothing turns off."""
    with Path("/dev/null").open("w") as nowhere, contextlib.redirect_stderr(nowhere):
        yield
