"""The manifest: what a model package says about itself. `FORMAT.md` is the written specification.

Canonical bytes are sorted-key, compact, UTF-8 JSON; their SHA-256 is the package's digest and its
identity, so `Manifest.from_bytes(m.to_bytes()) == m` and equal manifests have equal digests.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, ValidationError, field_validator

from cluster.config import StrictModel
from cluster.errors import ForbiddenFileError, NewerFormatError, PackageError
from cluster.model_package.files import MODEL_DIR, check_file_name
from cluster.processing import Processing, TensorSpec

FORMAT_VERSION = 1

Kind = Literal["language_model", "graph", "adapter"]
Line = Annotated[str, Field(pattern=r"^\P{Cc}*$")]
"""Text that people are shown: control characters could write over the screen."""

_DIGEST = re.compile(r"sha256:([0-9a-f]{64})", re.ASCII)


class FileEntry(StrictModel):
    """One file of the package."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size_bytes: int = Field(ge=0)


class Golden(StrictModel):
    """Inputs with the outputs that every replica must reproduce before it takes traffic.

    For a graph: what a client sends and gets, as nested lists by name. For a language model:
    `prompts` (token ids) and `max_new_tokens` in; `completions` (greedy token ids), their `margins`
    (largest logit minus the next) and `first_logits` (the largest after each prompt) out; and what
    golden_text.py adds.
    """

    inputs: dict[str, JsonValue]
    outputs: dict[str, JsonValue]
    tolerance: float = Field(1e-4, ge=0)
    """Largest absolute difference allowed in floating-point outputs."""


class Lineage(StrictModel):
    """Where the package came from; empty text where it is not known."""

    source: Line = ""
    """What made it: 'jobs.train', 'import', …"""
    dataset_digest: Line = ""
    run_id: Line = ""
    sweep_run_id: Line = ""
    """The sweep whose best trial `run_id` is."""
    job_id: Line = ""
    git_commit: Line = ""
    parent_digest: Line = ""
    """Digest of the package this one was derived from."""


class LanguageModelInfo(StrictModel):
    """What serving must know of a language model without loading it."""

    architecture: Line
    max_context_tokens: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    num_parameters: int = Field(ge=1)
    eos_token_ids: tuple[int, ...] = ()
    has_chat_template: bool = False


class AdapterInfo(StrictModel):
    """What an adapter needs to be of use."""

    base_digest: str = Field(pattern=r"^sha256:[0-9a-f]{64}$")
    """Package of the language model that it was trained on."""


class Manifest(StrictModel):
    """Everything a package declares. File names are POSIX paths relative to the package."""

    format_version: int = Field(FORMAT_VERSION, ge=1, strict=True)
    kind: Kind
    name: Line
    """Name it was published under; the registry may list it under others too."""
    created_at: Line
    files: dict[str, FileEntry]
    inputs: tuple[TensorSpec, ...] = ()
    """What the graph takes (empty for language models)."""
    outputs: tuple[TensorSpec, ...] = ()
    """What the graph gives, before post-processing."""
    processing: Processing = Processing()
    language_model: LanguageModelInfo | None = None
    """Of an adapter: what its base is with it."""
    adapter: AdapterInfo | None = None
    quantisation: dict[str, JsonValue] = Field(default_factory=dict)
    profile: dict[str, JsonValue] = Field(default_factory=dict)
    """Statistics of the training data, for drift detection."""
    metrics: dict[Line, float] = Field(default_factory=dict)
    """Quality on held-out data when it was made."""
    parity: dict[str, JsonValue] = Field(default_factory=dict)
    """Of a derived package: `largest_difference` from its parent, and its `tolerance`."""
    golden: Golden
    lineage: Lineage = Lineage()

    @field_validator("files")
    @classmethod
    def _file_names(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for name in files:
            check_file_name(name)
            if not name.startswith(f"{MODEL_DIR}/"):
                raise ForbiddenFileError(
                    f"file '{name}' lies outside {MODEL_DIR}/", hint="publish the package again"
                )
        return files

    def to_bytes(self) -> bytes:
        """Canonical bytes."""
        # Without an adapter its key is left out, as it was before there were any.
        values = self.model_dump(mode="json", exclude=None if self.adapter else {"adapter"})
        text = json.dumps(
            values, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        )
        return text.encode("utf-8")

    @property
    def digest(self) -> str:
        """`sha256:` and 64 hexadecimal digits, of the bytes that this version would write.

        For a package that was read, its `ModelPackage.digest` counts: an older version may have
        written other bytes.
        """
        return digest_of(self.to_bytes())

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Parse *verified* bytes.

        Raises:
            NewerFormatError: the package was written by a newer Heliostat.
            PackageError: not a manifest.
        """
        try:
            values: Any = json.loads(
                data, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant
            )
        # Python gives up on deep nesting with a RecursionError.
        except (ValueError, RecursionError):
            raise PackageError(
                "manifest.json is not JSON", hint="publish the package again"
            ) from None
        version = values.get("format_version") if isinstance(values, dict) else None
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise NewerFormatError(
                f"the package has format version {version!s:.40}, "
                f"expected {FORMAT_VERSION} or older",
                hint="upgrade Heliostat",
            )
        try:
            manifest = cls.model_validate(values)
            manifest.to_bytes()
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise PackageError(
                f"manifest.json: '{where[:200]}': {first['msg']}".replace("\n", " "),
                hint="publish the package again",
            ) from None
        # Numbers beyond a double become infinite; half of a surrogate pair is no text.
        except ValueError:
            raise PackageError(
                "manifest.json has a number or a text that nobody can write",
                hint="publish the package again",
            ) from None
        return manifest


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Two readers must not see two manifests in the same bytes."""
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key appears twice")
    return values


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def digest_of(data: bytes) -> str:
    """The digest text of some bytes."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def package_key(digest: str) -> str:
    """Where a package lies in storage."""
    match = _DIGEST.fullmatch(digest)
    if match is None:
        raise PackageError(
            f"package digest {digest[:100]!r} is not valid", hint="write sha256: and 64 hex digits"
        )
    return f"packages/{match[1]}"
