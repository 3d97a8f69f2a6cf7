"""What verifying a package costs: a verified load against a plain one that touches every byte.

Both load the same safetensors file (0.5 GB) and add up all of its bytes; ours first checks the
signature and every digest, as each replica does when it starts. Everything is in the page cache.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.measure import Row, compare
from cluster.model_package import LocalSigner, TrustStore, ensure_local_key, open_package
from cluster.model_package import write_package as publish
from cluster.storage import Storage

WEIGHTS = "model/model.safetensors"


def measure() -> tuple[Row, ...]:
    with tempfile.TemporaryDirectory(prefix="heliostat-bench-") as directory:
        return (_measure_warm(Path(directory)),)


def _measure_warm(directory: Path) -> Row:
    keys, cache = directory / "keys", directory / "cache"
    ensure_local_key(keys)
    storage = Storage.open(str(directory / "storage"))
    published = publish(
        _save_model(directory / "model"),
        name="large",
        kind="language_model",
        storage=storage,
        signer=LocalSigner(keys),
    )

    def verified() -> float:
        package = open_package(
            published.digest, storage=storage, trust=TrustStore(keys), cache_dir=cache
        )
        return _load(package.path / WEIGHTS)

    return compare(
        "seconds to load 0.5 GB, warm cache",
        ours=verified,
        peer=lambda: _load(Path(published.location) / WEIGHTS),
        peer_name="plain load",
        at_most=1.5,
    )


def _save_model(directory: Path) -> Path:
    """A random Llama of 125 million parameters in float32."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(vocab={"<end>": 0, "a": 1, "b": 2}, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(
        directory
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024,
        num_hidden_layers=9,
        num_attention_heads=16,
        intermediate_size=2816,
        vocab_size=8192,
        eos_token_id=0,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def _load(path: Path) -> float:
    """Load every tensor and touch every byte, at the speed of memory."""
    from safetensors.torch import load_file

    return sum(float(tensor.sum()) for tensor in load_file(path).values())
