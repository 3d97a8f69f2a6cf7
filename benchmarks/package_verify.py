"""What verifying a package costs: a verified load against a plain one that touches every byte.

Both load the same safetensors (1 GB, in one file or in eight) and add up all of their bytes; ours
first checks the signature and every digest, as each replica does when it starts. Warm: everything
is in the page cache. Cold: it is dropped from there before each load, so both read the disk.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.measure import Row, compare
from cluster.model_package import (
    LocalSigner,
    ModelPackage,
    TrustStore,
    ensure_local_key,
    open_package,
    write_package,
)
from cluster.storage import Storage

_NUM_SHARDS = 8
_MEMORY_GOAL_MB = 300


class _Installation:
    """A package in storage and in the cache, and the directory it was made from."""

    def __init__(self, home: Path, digest: str) -> None:
        self._home = home
        self._digest = digest
        self.plain = home / "model"

    @classmethod
    def make(cls, home: Path, num_shards: int) -> _Installation:
        ensure_local_key(home / "keys")
        published = write_package(
            _save_model(home / "model", num_shards),
            name="large",
            kind="language_model",
            storage=Storage.open(str(home / "storage")),
            signer=LocalSigner(home / "keys"),
        )
        installed = cls(home, published.digest)
        installed.open()
        os.sync()
        return installed

    def open(self) -> ModelPackage:
        return open_package(
            self._digest,
            storage=Storage.open(str(self._home / "storage")),
            trust=TrustStore(self._home / "keys"),
            cache_dir=self.cached,
        )

    @property
    def cached(self) -> Path:
        return self._home / "cache"

    def peak_mb(self, way: str) -> float:
        command = [sys.executable, "-m", "benchmarks.package_verify"]
        found = subprocess.run(
            [*command, str(self._home), self._digest, way],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        return float(found.stdout)


def measure() -> tuple[Row, ...]:
    rows: list[Row] = []
    for num_shards in (1, _NUM_SHARDS):
        with tempfile.TemporaryDirectory(prefix="heliostat-bench-") as directory:
            rows += _measure(_Installation.make(Path(directory), num_shards), num_shards)
    return tuple(rows)


def _measure(installed: _Installation, num_shards: int) -> list[Row]:
    layout = "one file" if num_shards == 1 else f"{num_shards} files"

    def compared(cache: str, at_most: float, before: Callable[[], object]) -> Row:
        return compare(
            f"seconds to load 1 GB in {layout}, {cache} cache",
            ours=lambda: load(installed.open().model_dir),
            peer=lambda: load(installed.plain),
            peer_name="plain load",
            at_most=at_most,
            before=before,
        )

    warm = compared("warm", 1.5, lambda: None)
    cold = compared("cold", 1.15, lambda: _forget([installed.plain, installed.cached]))
    extra_mb = installed.peak_mb("verified") - installed.peak_mb("plain")
    note = f"peak memory {extra_mb:.0f} MB above a plain load's (goal: <= {_MEMORY_GOAL_MB})"
    return [warm.model_copy(update={"note": note}), cold]


def load(model_dir: Path) -> float:
    """Load every tensor and touch every byte, at the speed of memory."""
    from safetensors.torch import load_file

    return sum(
        float(tensor.sum())
        for path in sorted(model_dir.glob("*.safetensors"))
        for tensor in load_file(path).values()
    )


def _forget(directories: list[Path]) -> None:
    """Drop clean pages from the page cache; what lies below this machine may still hold them."""
    for directory in directories:
        for path in directory.rglob("*.safetensors"):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def _save_model(directory: Path, num_shards: int) -> Path:
    """A random Llama of 250 million parameters in float32."""
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
        num_hidden_layers=19,
        num_attention_heads=16,
        intermediate_size=2816,
        vocab_size=8192,
        eos_token_id=0,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    size_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(directory, max_shard_size=size_bytes * 105 // 100 // num_shards)
    return directory


def main(home: str, digest: str, way: str) -> None:
    """Load once and print this process's peak memory in MB."""
    installed = _Installation(Path(home), digest)
    load(installed.open().model_dir if way == "verified" else installed.plain)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6)


if __name__ == "__main__":
    main(*sys.argv[1:])
