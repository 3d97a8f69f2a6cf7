"""How long training waits for a checkpoint: ours, written while it goes on, and DeepSpeed's own.

The Llama of 30 million parameters of `train_throughput`, on 2 workers over gloo with ZeRO stage 1,
weights and optimizer in float32: 0.36 GB of state. Both ways save the same run in turn, to the same
file system; ours is synced to the disk and has digests, DeepSpeed's has neither.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import Row, row_of
from benchmarks.train_throughput import TORCHRUN, run

PAIRS = 9


def measure() -> tuple[Row, ...]:
    with tempfile.TemporaryDirectory(prefix="heliostat-bench-") as directory:
        module = ["-m", "benchmarks.checkpoint_child", str(Path(directory)), str(PAIRS)]
        lines = run([*TORCHRUN, *module])
    found = [json.loads(line) for line in lines if line.startswith("{")]
    return (
        row_of(
            "seconds that training waits for a checkpoint",
            pairs=_pairs(found, "blocked_s"),
            peer_name="DeepSpeed's save_checkpoint",
            at_most=0.25,
        ),
        row_of(
            "seconds that a checkpoint costs in all",
            pairs=_pairs(found, "in_all_s"),
            peer_name="DeepSpeed's save_checkpoint",
            note="with the steps that are slower while it is written, on as many cores as workers",
        ),
    )


def _pairs(found: Sequence[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    ours, peer = ([one[name] for one in found if one["arm"] == arm] for arm in ("ours", "peer"))
    return list(zip(ours, peer, strict=True))
