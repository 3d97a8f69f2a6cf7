"""Tokens per second of a training: ours against a bare DeepSpeed loop, and under Ray against not.

A Llama of 30 million parameters on 2 workers over gloo, rows of 512 tokens of Python's own help
texts, 8 rows per step, bfloat16, ZeRO stage 1, one thread per worker. A round runs every arm once,
in an order that moves on; an arm's figure in a round is the median of its steps after the first.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from benchmarks.measure import Row, row_of
from benchmarks.training_child import ChildJob
from cluster.storage import Storage
from jobs.data.catalog import DatasetCatalog
from jobs.data.dataset import Dataset
from jobs.training.config import TrainConfig

ROUNDS = 3
STEPS, WARM_UP_STEPS = 12, 4
WORKERS, MICRO_BATCH = 2, 4
_TIMEOUT_S = 300

Arm = Callable[[], float]


def measure() -> tuple[Row, ...]:
    with tempfile.TemporaryDirectory(prefix="heliostat-bench-") as directory:
        bench = _Bench(Path(directory))
        arms: Mapping[str, Arm] = {
            "ours": lambda: bench.ours("local"),
            "peer": lambda: bench.peer(compiled=False),
            "peer compiled": lambda: bench.peer(compiled=True),
            "ours under Ray": lambda: bench.ours("ray"),
        }
        for name in ("ours", "peer compiled"):
            arms[name]()  # compiles what later rounds find
        found = interleaved(arms, ROUNDS)
    return (
        row_of(
            "tokens/s, 30 M parameters",
            pairs=_pairs(found, "ours", "peer"),
            peer_name="bare DeepSpeed loop",
            at_least=1.25,
        ),
        row_of(
            "tokens/s, both compiled",
            pairs=_pairs(found, "ours", "peer compiled"),
            peer_name="bare DeepSpeed loop, engine.compile()",
        ),
        row_of(
            "tokens/s under Ray Train",
            pairs=_pairs(found, "ours under Ray", "ours"),
            peer_name="our loop under torchrun",
            at_least=0.98,
        ),
    )


def interleaved(arms: Mapping[str, Arm], rounds: int) -> dict[str, list[float]]:
    """Every arm once per round; each round begins with another arm."""
    names = list(arms)
    found: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            found[name].append(arms[name]())
    return found


def _pairs(found: Mapping[str, list[float]], ours: str, peer: str) -> list[tuple[float, float]]:
    return list(zip(found[ours], found[peer], strict=True))


class _Bench:
    """The arms, on one prepared dataset."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._compiled_dir = directory / "compiled"
        config = make_config("local")
        catalog = DatasetCatalog(Storage.open(str(directory / "storage")), directory / "cache")
        dataset, _ = catalog.ensure(config.data)
        self._dataset_dir = dataset.directory
        self._rows_path = directory / "rows.npy"
        np.save(self._rows_path, _all_rows(dataset))
        self._number = 0

    def ours(self, launcher: str) -> float:
        self._number += 1
        job = ChildJob(
            config=make_config(launcher),
            dataset_dir=self._dataset_dir,
            run_dir=self._directory / f"run-{self._number}",
            compiled_dir=self._compiled_dir,
        )
        path = self._directory / "job.json"
        path.write_text(job.model_dump_json(exclude_unset=True), encoding="utf-8")
        module = ["-m", "benchmarks.training_child", str(path)]
        lines = run([*TORCHRUN, *module] if launcher == "local" else [sys.executable, *module])
        events = [json.loads(line) for line in lines if line.startswith("{")]
        return _typical([event["units_per_s"] for event in events if event["event"] == "Progress"])

    def peer(self, *, compiled: bool) -> float:
        script = str(Path(__file__).with_name("deepspeed_peer.py"))
        arguments = [str(self._rows_path), "yes" if compiled else "no", str(STEPS)]
        lines = run(
            [*TORCHRUN, script, *arguments, str(MICRO_BATCH)],
            TORCHINDUCTOR_CACHE_DIR=str(self._compiled_dir),
        )
        return _typical([float(line.split()[2]) for line in lines if line.startswith("step ")])


TORCHRUN = [
    sys.executable, "-m", "torch.distributed.run",
    "--standalone", "--nproc-per-node", str(WORKERS),
]  # fmt: skip


def make_config(launcher: str) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "name": "throughput",
            "data": {
                "name": "python_topics",
                "source": {"kind": "python_topics"},
                "text": {
                    "tokenizer": {"kind": "bpe", "vocab_size": 8192},
                    "sequence_length": 512,
                },
            },
            "model": {
                "family": "causal_lm",
                "hidden_size": 512,
                "num_layers": 8,
                "num_heads": 8,
                "intermediate_size": 1408,
            },
            "steps": STEPS,
            "batch_size": WORKERS * MICRO_BATCH,
            "schedule": {"kind": "constant"},
            "precision": "bf16",
            "compile": True,
            "num_workers": WORKERS,
            "device": "cpu",
            "launcher": launcher,
            "log_every_steps": 1,
            "evaluate_every_steps": STEPS,
            "checkpoint": {"every_steps": STEPS},
            "resume": "never",
        }
    )


def _all_rows(dataset: Dataset) -> np.ndarray:
    rows = dataset.rows("train")
    tokens: np.ndarray = rows.read(np.arange(len(rows)))["tokens"]
    return tokens


def _typical(speeds: list[float]) -> float:
    if len(speeds) != STEPS:
        raise RuntimeError(f"{len(speeds)} of {STEPS} steps were reported")
    return statistics.median(speeds[WARM_UP_STEPS:])


def run(command: list[str], **environment: str) -> list[str]:
    """Lines that a command prints; raises RuntimeError with its last words if it fails."""
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **environment},
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[-4:])} failed:\n{done.stderr[-2000:]}")
    return done.stdout.splitlines()
