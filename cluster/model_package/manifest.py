"""The manifest: what a model package says about itself. `FORMAT.md` is the written specification.

Canonical bytes are sorted-key, compact, UTF-8 JSON; their SHA-256 is the package's digest and its
identity, so `Manifest.from_bytes(m.to_bytes()) == m` and equal manifests have equal digests.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import Field, JsonValue, ValidationError

from cluster.config import StrictModel
from cluster.errors import NewerFormatError, PackageError
from cluster.processing import Processing, TensorSpec

FORMAT_VERSION = 1

Kind = Literal["language_model", "graph", "adapter"]


class FileEntry(StrictModel):
    """One file of the package."""

    sha256: str
    size_bytes: int = Field(ge=0)


class Golden(StrictModel):
    """Inputs with the outputs that every replica must reproduce before it takes traffic.

    For a graph: tensors by name, as nested lists. For a language model: `prompts` (token ids) in,
    `completions` (greedy token ids) and `first_logits` (the largest logits after each prompt) out.
    """

    inputs: dict[str, JsonValue]
    outputs: dict[str, JsonValue]
    tolerance: float = Field(1e-4, ge=0)
    """Largest absolute difference allowed in floating-point outputs."""


class Lineage(StrictModel):
    """Where the package came from; empty text where it is not known."""

    source: str = ""
    """What made it: 'jobs.train', 'import', …"""
    dataset_digest: str = ""
    run_id: str = ""
    job_id: str = ""
    git_commit: str = ""
    parent_digest: str = ""
    """Digest of the package this one was derived from."""


class LanguageModelInfo(StrictModel):
    """What serving must know of a language model without loading it."""

    architecture: str
    max_context_tokens: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    num_parameters: int = Field(ge=1)
    eos_token_ids: tuple[int, ...] = ()
    has_chat_template: bool = False


class Manifest(StrictModel):
    """Everything a package declares. File names are POSIX paths relative to the package."""

    format_version: int = FORMAT_VERSION
    kind: Kind
    name: str
    """Name it was published under; the registry may list it under others too."""
    created_at: str
    files: dict[str, FileEntry]
    inputs: tuple[TensorSpec, ...] = ()
    """What the graph takes (empty for language models)."""
    outputs: tuple[TensorSpec, ...] = ()
    """What the graph gives, before post-processing."""
    processing: Processing = Processing()
    language_model: LanguageModelInfo | None = None
    quantisation: dict[str, JsonValue] = Field(default_factory=dict)
    profile: dict[str, JsonValue] = Field(default_factory=dict)
    """Statistics of the training data, for drift detection."""
    metrics: dict[str, float] = Field(default_factory=dict)
    """Quality on held-out data when it was made."""
    parity: dict[str, JsonValue] = Field(default_factory=dict)
    """For derived packages: largest difference from the parent on its golden inputs."""
    golden: Golden
    lineage: Lineage = Lineage()

    def to_bytes(self) -> bytes:
        """Canonical bytes."""
        values = self.model_dump(mode="json")
        text = json.dumps(
            values, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        )
        return text.encode("utf-8")

    @property
    def digest(self) -> str:
        """`sha256:` and 64 hexadecimal digits."""
        return digest_of(self.to_bytes())

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Parse *verified* bytes.

        Raises:
            NewerFormatError: the package was written by a newer Heliostat.
            PackageError: not a manifest.
        """
        try:
            values: Any = json.loads(data)
        except ValueError:
            raise PackageError(
                "manifest.json is not JSON", hint="publish the package again"
            ) from None
        version = values.get("format_version") if isinstance(values, dict) else None
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise NewerFormatError(
                f"the package has format version {version}, expected {FORMAT_VERSION} or older",
                hint="upgrade Heliostat",
            )
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise PackageError(
                f"manifest.json: '{where}': {first['msg']}", hint="publish the package again"
            ) from None


def digest_of(data: bytes) -> str:
    """The digest text of some bytes."""
    return "sha256:" + hashlib.sha256(data).hexdigest()
