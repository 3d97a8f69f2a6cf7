"""The speed of matrix products on a worker's device, measured once and kept: what MFU refers to.

peak = matmul_peak(home / "cache" / PEAKS_FILE, device, "bf16")      # operations per second
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

PEAKS_FILE = "matmul_peaks.json"
Precision = Literal["fp32", "bf16"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_SIZES = {"cpu": 2048, "cuda": 8192}
_MIN_SECONDS = 0.3
_MIN_PRODUCTS = 3


def matmul_peak(path: Path, device: torch.device, precision: Precision) -> float:
    """From the file at `path`, or measured and added to it; a file that cannot be written costs
    another measurement next time."""
    key = _key(device, precision, torch.get_num_threads())
    known = _read(path)
    if key not in known:
        known[key] = measure_matmul(device, precision)
        _write(path, known)
    return known[key]


def known_peak(
    path: Path, device: torch.device, precision: Precision, num_threads: int
) -> float | None:
    """Only what has been measured before."""
    return _read(path).get(_key(device, precision, num_threads))


def measure_matmul(device: torch.device, precision: Precision) -> float:
    """The fastest of some products of square matrices."""
    size = _SIZES[device.type]
    left, right = (torch.randn(size, size, device=device).to(_DTYPES[precision]) for _ in range(2))
    wait = torch.cuda.synchronize if device.type == "cuda" else _nothing
    left @ right
    seconds: list[float] = []
    while sum(seconds) < _MIN_SECONDS or len(seconds) < _MIN_PRODUCTS:
        seconds.append(_seconds_of(lambda: left @ right, wait))
    return 2 * size**3 / min(seconds)


def _seconds_of(action: Callable[[], object], wait: Callable[[], None]) -> float:
    wait()
    started_at = time.perf_counter()
    action()
    wait()
    return time.perf_counter() - started_at


def _nothing() -> None:
    """A CPU computes at once."""


def _key(device: torch.device, precision: Precision, num_threads: int) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {precision}"
    return f"{_cpu_name()}, {num_threads} threads, {precision}"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "CPU"
    return next((line.partition(":")[2].strip() for line in lines if "model name" in line), "CPU")


def _read(path: Path) -> dict[str, float]:
    try:
        return {str(key): float(value) for key, value in json.loads(path.read_bytes()).items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _write(path: Path, peaks: dict[str, float]) -> None:
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(peaks, indent=1), encoding="utf-8")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
