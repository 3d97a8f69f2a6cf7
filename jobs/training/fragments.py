"""One worker's share of a training state as one safetensors file.

A *fragment* is what one worker holds of one parameter: the values [start, stop) of its flattened
master weight and of each optimizer state. Every tensor of the file is named KIND/PARAMETER; the
ranges stand in the checkpoint's manifest. Any worker of any later layout finds what it needs by
range, so files are bound to no number of workers and no ZeRO stage. There is no pickle anywhere.

It knows nothing of DeepSpeed, of checkpoints or of where files lie.

    image = HostBuffer(pin=False).fill({"master/head.weight": weight[8:16]})
    for chunk in image.chunks(): file.write(chunk)
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from jobs.training.manifest import Range

MASTER, BUFFER = "master", "buffer"
"""Kinds of tensors: the weights that are stepped, and what a model keeps beside them."""

_CHUNK_BYTES = 8 * 1024**2
_DTYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Image:
    """A safetensors file in memory; it stays as it is until its buffer is filled again."""

    header: bytes
    body: torch.Tensor

    @property
    def size_bytes(self) -> int:
        return len(self.header) + self.body.numel()

    def chunks(self) -> Iterator[memoryview]:
        yield memoryview(self.header)
        body = self.body.numpy().data
        for start in range(0, len(body), _CHUNK_BYTES):
            yield body[start : start + _CHUNK_BYTES]


class HostBuffer:
    """Host memory for one image, kept from save to save: fresh pages cost more than the copy."""

    def __init__(self, *, pin: bool) -> None:
        self._pin = pin
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def reserve(self, size_bytes: int) -> None:
        """Have this much memory at hand."""
        if self._bytes.numel() < size_bytes:
            self._bytes = torch.zeros(size_bytes, dtype=torch.uint8, pin_memory=self._pin)

    def fill(self, tensors: Mapping[str, torch.Tensor]) -> Image:
        """Copy tensors, from any device, into an image."""
        # The widest first, so that each one is aligned without gaps.
        names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
        header, size = _layout({name: tensors[name] for name in names})
        self.reserve(size)
        start = 0
        for name in names:
            source = tensors[name].detach().reshape(-1)
            target = self._bytes[start : start + source.nbytes].view(source.dtype)
            target.copy_(source, non_blocking=self._pin)
            start += source.nbytes
        if self._pin:
            torch.cuda.synchronize()
        return Image(header, self._bytes[:size])


def _layout(tensors: Mapping[str, torch.Tensor]) -> tuple[bytes, int]:
    """The header of a safetensors file, and the size of what follows it."""
    entries: dict[str, Any] = {}
    start = 0
    for name, tensor in tensors.items():
        entries[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, start + tensor.nbytes],
        }
        start += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, start


Held = Mapping[str, Mapping[str, Range]]
"""By file, the range of each parameter that it holds; no two of a parameter overlap."""


def needed_files(held: Held, wanted: Mapping[str, Range]) -> list[str]:
    """Files that hold some of what is wanted."""
    return [
        file
        for file, ranges in held.items()
        if any(_common(span, wanted.get(parameter, (0, 0))) for parameter, span in ranges.items())
    ]


def extents(pieces: Iterable[Mapping[str, Range]]) -> dict[str, int]:
    """By parameter, where its last piece ends; its number of values, if the pieces are all."""
    ends: dict[str, int] = {}
    for ranges in pieces:
        for parameter, (_, stop) in ranges.items():
            ends[parameter] = max(stop, ends.get(parameter, 0))
    return ends


def difference(held: Held, sizes: Mapping[str, int]) -> str:
    """Why files are not all parameters of these sizes and no others; empty if they are."""
    found = extents(held.values())
    lacking = [name for name in sizes if not _is_whole(held, name, found.get(name, -1))]
    if lacking:
        return f"it lacks {len(lacking)} parameters, '{lacking[0]}' for one"
    if extra := sorted(found.keys() - sizes.keys()):
        return f"it has {len(extra)} parameters more, '{extra[0]}' for one"
    for name, size in sizes.items():
        if found[name] != size:
            return f"its '{name}' has {found[name]:,} values, and here it has {size:,}"
    return ""


def _is_whole(held: Held, parameter: str, size: int) -> bool:
    """Whether the pieces of a parameter follow one another from 0 to its size."""
    end = 0
    for start, stop in sorted(ranges[parameter] for ranges in held.values() if parameter in ranges):
        if not start == end <= stop:
            return False
        end = stop
    return end == size


class FragmentFiles:
    """Files that together hold what is wanted; each is memory-mapped when first needed."""

    def __init__(self, directory: Path, held: Held) -> None:
        self._directory, self._held = directory, held
        self._mapped: dict[str, _MappedFile] = {}
        self._holders: dict[str, list[tuple[Range, str]]] = {}
        for file, ranges in held.items():
            for parameter, span in ranges.items():
                self._holders.setdefault(parameter, []).append((span, file))

    def problem(self, files: Iterable[str]) -> str:
        """What of these files is not as their ranges say, in words; empty if all is."""
        from safetensors import SafetensorError

        for file in files:
            try:
                wrong = self._map(file).wrong(self._held[file])
            except (SafetensorError, ValueError) as error:
                return f"{file} is no file of fragments: {error}"
            if wrong:
                return f"{file} does not hold its range of '{wrong}'"
        return ""

    def kinds(self, parameter: str, span: Range) -> set[str]:
        """What is stored of a range beside its weights: 'exp_avg', 'step', …"""
        files = {file for _, file in self._holding(parameter, span)}
        return {kind for file in files for kind in self._map(file).kinds.get(parameter, ())}

    def read(self, kind: str, parameter: str, span: Range, into: torch.Tensor) -> None:
        """Copy a range into a flat tensor of its length; where none is stored, it stays."""
        for held, file in self._holding(parameter, span):
            if kind not in self._map(file).kinds.get(parameter, ()):
                continue
            low, high = max(held[0], span[0]), min(held[1], span[1])
            values = self._map(file).tensors.get_slice(f"{kind}/{parameter}")
            into[low - span[0] : high - span[0]].copy_(values[low - held[0] : high - held[0]])

    def sample(self, kind: str, parameter: str, span: Range) -> torch.Tensor | None:
        """A value that a whole range shares, such as its number of steps, or an empty tensor of the
        type of many; None where there is neither."""
        for _, file in self._holding(parameter, span):
            if kind in self._map(file).kinds.get(parameter, ()):
                values = self._map(file).tensors.get_slice(f"{kind}/{parameter}")
                sample: torch.Tensor = values[:0] if values.get_shape() else values[...]
                return sample
        return None

    def _holding(self, parameter: str, span: Range) -> list[tuple[Range, str]]:
        holders = self._holders.get(parameter, ())
        return [(held, file) for held, file in holders if _common(held, span)]

    def _map(self, file: str) -> _MappedFile:
        if file not in self._mapped:
            self._mapped[file] = _MappedFile.open(self._directory / file)
        return self._mapped[file]


@dataclass(frozen=True)
class _MappedFile:
    tensors: Any
    kinds: dict[str, set[str]]
    """By parameter."""

    @classmethod
    def open(cls, path: Path) -> _MappedFile:
        from safetensors import safe_open

        tensors: Any = safe_open(str(path), framework="pt")
        kinds: dict[str, set[str]] = {}
        for name in tensors.keys():  # noqa: SIM118 - it is no dict
            kind, parameter = name.split("/", 1)
            kinds.setdefault(parameter, set()).add(kind)
        return cls(tensors, kinds)

    def wrong(self, ranges: Mapping[str, Range]) -> str:
        """A parameter of which other than this range is there."""
        for parameter, (start, stop) in ranges.items():
            shapes = {
                kind: self.tensors.get_slice(f"{kind}/{parameter}").get_shape()
                for kind in self.kinds.get(parameter, ())
            }
            weights = shapes.get(MASTER, shapes.get(BUFFER))
            if weights != [stop - start] or any(
                shape not in ([], weights) for shape in shapes.values()
            ):
                return parameter
        return ""


def _common(first: Range, second: Range) -> int:
    """How many values two ranges share."""
    return max(0, min(first[1], second[1]) - max(first[0], second[0]))
