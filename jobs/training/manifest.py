"""A checkpoint's manifest: what it is of, and the size, digest and ranges of every file.

It is written last, and holds its own digest; no other file of a checkpoint is parsed before its
bytes have been compared with what stands here. It knows nothing of where files lie.

    data = manifest.to_bytes()
    Manifest.from_bytes(data).step
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import Field, JsonValue, ValidationError

from cluster.config import StrictModel, first_problem

Range = tuple[int, int]
"""[start, stop) in a flattened parameter."""

MANIFEST_FILE = "checkpoint.json"
FORMAT = "fragments/1"
_OWN_DIGEST = "sha256"


class OtherFormatError(ValueError):
    """A whole manifest, of a format that this version does not read."""


class FileRecord(StrictModel):
    """A worker's file."""

    size_bytes: int
    sha256: str
    part: int
    """Which part of the model it is of, where `parallelism` divides one."""
    ranges: dict[str, Range]
    """By parameter, what the file holds of its flattened values."""


class Manifest(StrictModel):
    """What a checkpoint consists of."""

    format: str = FORMAT
    step: int
    """Steps done when it was written: training goes on with the step of this number."""
    world_size: int
    tensor: int = 1
    pipeline: int = 1
    """How one copy of the model was divided; another division cannot read it."""
    dataset_digest: str = ""
    """The data that it was trained on; empty if it was written before this was kept."""
    memory: dict[str, JsonValue] = Field(default_factory=dict)
    """What the run remembers; see `RunMemory`."""
    engine: dict[str, JsonValue] = Field(default_factory=dict)
    """Counters, rates and scales of the engine."""
    files: dict[str, FileRecord] = Field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files.values())

    def to_bytes(self) -> bytes:
        values = self.model_dump(mode="json")
        return json.dumps({**values, _OWN_DIGEST: _digest(values)}, indent=1).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Raises ValueError, in one line, if these are not the bytes of a whole manifest;
        OtherFormatError if they are of another format."""
        try:
            values: Any = json.loads(data)
            if not isinstance(values, dict) or values.pop(_OWN_DIGEST, "") != _digest(values):
                raise ValueError("its digest does not match")
            if values.get("format") != FORMAT:
                raise OtherFormatError(f"format {values.get('format')!r}, expected {FORMAT!r}")
            return cls.model_validate(values)
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        except ValidationError as error:
            raise ValueError(first_problem(error)) from None


def _digest(values: dict[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
