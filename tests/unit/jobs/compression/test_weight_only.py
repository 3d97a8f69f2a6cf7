"""Quantised language models, as transformers, our engine and the writer see them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cluster.errors import InputError
from cluster.model_package import Lineage, ensure_local_key, golden, verify_directory, write_package
from cluster.model_package.language_model import load_reference
from cluster.model_package.signing import LocalSigner, TrustStore
from cluster.storage import Storage
from jobs.compression.config import WeightOnlyConfig
from jobs.compression.weight_only import check_group_size, quantise_weights
from tests.tiny_models import save_llama

TEXT = "the mirror follows the sun and keeps its rays on one target"
INT8 = WeightOnlyConfig(method="int8_weights", group_size=32)
INT4 = WeightOnlyConfig(method="int4_weights", group_size=32)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("model"), TEXT, steps=60)


@pytest.fixture(scope="module")
def quantised(
    model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, dict[str, str | int]]]:
    """Directory and record of each method."""
    found = {}
    for candidate in (INT8, INT4, WeightOnlyConfig(method="int8_weights", group_size=None)):
        directory = tmp_path_factory.mktemp(candidate.label)
        found[candidate.label] = directory, quantise_weights(model_dir, directory, candidate)
    return found


def logits(directory: Path) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = load_reference(directory)(torch.arange(40)[None]).logits
    return found


def test_fewer_bits_are_fewer_bytes_and_further_off(
    model_dir: Path, quantised: dict[str, tuple[Path, dict[str, str | int]]]
) -> None:
    expected = logits(model_dir)
    largest = expected.abs().max()
    sizes, differences = {}, {}
    for label, (directory, _) in quantised.items():
        sizes[label] = (directory / "model.safetensors").stat().st_size
        differences[label] = float((logits(directory) - expected).abs().max() / largest)
    original = (model_dir / "model.safetensors").stat().st_size
    assert original > 1.5 * sizes["int8_weights-g32"] > 1.5 * sizes["int4_weights-g32"]
    assert 0 < differences["int8_weights-g32"] < 0.02
    assert differences["int8_weights-g32"] < differences["int4_weights-g32"] < 0.5
    # One scale to a row takes fewer bytes than one to each 32 weights.
    assert sizes["int8_weights-rows"] < sizes["int8_weights-g32"]


def test_every_weight_is_within_half_a_step_of_its_own(
    model_dir: Path, quantised: dict[str, tuple[Path, dict[str, str | int]]]
) -> None:
    directory, record = quantised["int4_weights-g32"]
    assert record["num_bits"] == 4
    before, after = load_reference(model_dir), load_reference(directory)
    for name, weight in before.named_parameters():
        found = after.get_parameter(name)
        if "proj" not in name:
            assert torch.equal(weight, found), f"{name} keeps its precision"
            continue
        groups = weight.unflatten(-1, (-1, 32))
        step = groups.abs().amax(-1, keepdim=True) / 7.5
        # The largest of a group may lie half a step beyond the last level.
        assert ((groups - found.unflatten(-1, (-1, 32))).abs() <= step * 0.501).all(), name


def test_transformers_loads_it_untouched_and_saves_it_plain(
    quantised: dict[str, tuple[Path, dict[str, str | int]]], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    directory, _ = quantised["int4_weights-g32"]
    config = json.loads((directory / "config.json").read_bytes())["quantization_config"]
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", "pack-quantized")
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype="float32").eval()
    with torch.inference_mode():
        found = theirs(torch.arange(40)[None]).logits
    assert torch.equal(found, logits(directory))
    ours = load_reference(directory)
    assert ours.num_parameters() == 26_816, "packed words are no parameters"
    ours.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_bytes())


def test_its_package_is_answered_by_our_engine(
    quantised: dict[str, tuple[Path, dict[str, str | int]]], tmp_path: Path
) -> None:
    from serve_apps.llm.continuous_batching import ContinuousBatchingEngine
    from serve_apps.llm.deployment import answer_golden_prompts

    directory, record = quantised["int4_weights-g32"]
    ensure_local_key(tmp_path / "keys")
    published = write_package(
        directory,
        name="small",
        kind="language_model",
        storage=Storage.open(str(tmp_path / "storage")),
        signer=LocalSigner(tmp_path / "keys"),
        golden_inputs=[TEXT],
        lineage=Lineage(source="test"),
        quantisation=record,
    )
    package = verify_directory(Path(published.location), TrustStore(tmp_path / "keys"))
    assert package.manifest.quantisation == record
    assert package.manifest.language_model is not None
    assert package.manifest.language_model.num_parameters == 26_816
    golden.replay(package)
    engine = ContinuousBatchingEngine.load(package.model_dir)
    try:
        golden.check_language_model(package.manifest, answer_golden_prompts(engine, package))
    finally:
        engine.close()


def test_groups_that_do_not_divide_rows_are_named(model_dir: Path) -> None:
    check_group_size(model_dir, INT4)
    with pytest.raises(InputError) as caught:
        check_group_size(model_dir, WeightOnlyConfig(method="int4_weights", group_size=64))
    assert str(caught.value) == (
        "group_size 64 does not divide the 32 columns of 'model.layers.0.self_attn.q_proj'; "
        "choose a smaller one, or null for one scale per row"
    )


def test_what_is_quantised_already_is_not_quantised_again(
    quantised: dict[str, tuple[Path, dict[str, str | int]]],
) -> None:
    with pytest.raises(InputError, match="quantised already"):
        check_group_size(quantised["int8_weights-g32"][0], INT4)
