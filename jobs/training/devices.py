"""Devices that a run may be planned for: how much memory one worker has, and how fast it computes.

find_device("h100-80g", num_workers=8).memory_bytes
find_device("24GiB", num_workers=1)
find_device("", num_workers=2)           # this machine's
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

import psutil
import torch

from cluster.errors import ConfigError

_GIB = 2**30
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?(GiB|GB|MiB|MB|TiB|TB)", re.ASCII)
_UNITS = {"MB": 1e6, "MiB": 2**20, "GB": 1e9, "GiB": _GIB, "TB": 1e12, "TiB": 2**40}
# The rest of a machine's memory is its system's, and other programs'.
_SHARE_OF_MACHINE = 0.8


@dataclass(frozen=True)
class Device:
    """What one worker has for itself."""

    name: str
    memory_bytes: int
    is_gpu: bool
    matmul_flops: dict[str, float]
    """Peak by precision, in operations per second; empty if it is not known."""


# Memory as the driver reports it; dense peaks from the makers' data sheets.
_GPUS = {
    "l4-24g": (22.5, 121e12, 60e12),
    "rtx4090-24g": (23.6, 165e12, 83e12),
    "a10-24g": (22.5, 125e12, 31e12),
    "l40s-48g": (44.5, 362e12, 92e12),
    "a100-40g": (39.4, 312e12, 156e12),
    "a100-80g": (79.2, 312e12, 156e12),
    "h100-80g": (79.1, 989e12, 495e12),
    "h200-141g": (139.8, 989e12, 495e12),
    "b200-180g": (178.3, 2250e12, 1125e12),
    "mi300x-192g": (191.7, 1307e12, 654e12),
}
_MACHINES_GIB = {"laptop-8g": 8, "laptop-16g": 16, "laptop-32g": 32, "workstation-64g": 64}


def find_device(name: str, num_workers: int) -> Device:
    """A device by its name, by a size such as 24GiB (a GPU's), or, unnamed, this machine's.

    Workers on a CPU share one machine's memory.

    Raises:
        ConfigError: there is no such device.
    """
    if not name:
        return _this_machine(num_workers)
    if name in _GPUS:
        memory_gib, bf16, fp32 = _GPUS[name]
        return Device(name, round(memory_gib * _GIB), True, {"bf16": bf16, "fp32": fp32})
    if name in _MACHINES_GIB:
        return _share_of_machine(name, _MACHINES_GIB[name] * _GIB, num_workers)
    if match := _SIZE.fullmatch(name):
        return Device(name, round(float(match[1]) * _UNITS[match[2]]), True, {})
    known = [*_GPUS, *_MACHINES_GIB]
    near = [one for one in known if name in one] or difflib.get_close_matches(name, known, n=1)
    raise ConfigError(
        f"planner.device '{name}' is not known" + (f"; did you mean '{near[0]}'?" if near else ""),
        hint=f"expected a size such as 24GiB, or one of: {', '.join(known)}",
        param="planner.device",
    )


def _this_machine(num_workers: int) -> Device:
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return Device(properties.name, properties.total_memory, True, {})
    return _share_of_machine("this machine", psutil.virtual_memory().total, num_workers)


def _share_of_machine(name: str, memory_bytes: int, num_workers: int) -> Device:
    share = memory_bytes * _SHARE_OF_MACHINE / num_workers
    return Device(name, round(share), False, {})
