"""Write a model package: stage, describe, compute golden outputs, hash, sign, publish in one step.

Nothing is left behind when any of it fails. `created_at` is part of the manifest, so writing the
same model twice gives two packages with two digests.

    published = write_package(
        Path("out/model"), name="digits", kind="graph", storage=storage,
        signer=LocalSigner(settings.keys_dir), golden_inputs={"pixels": pixels_BF},
    )
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from cluster.errors import HeliostatError, MachineError, MissingFileError, PackageError
from cluster.model_package import golden, golden_text
from cluster.model_package.encryption import Keyset
from cluster.model_package.files import (
    GRAPH,
    MANIFEST,
    MODEL_DIR,
    TOKENIZER,
    copy_files,
    list_files,
    refuse_code_references,
)
from cluster.model_package.hashing import sha256_files
from cluster.model_package.manifest import (
    AdapterInfo,
    FileEntry,
    Golden,
    Kind,
    LanguageModelInfo,
    Lineage,
    Manifest,
    package_key,
)
from cluster.model_package.reader import MAX_MANIFEST_BYTES, ModelPackage
from cluster.model_package.signing import Signer
from cluster.model_package.stored import publish
from cluster.model_ref import check_name
from cluster.processing import Array, Processing, check_processing
from cluster.storage import Storage

GoldenInputs = Mapping[str, Array] | Sequence[str]

_PROMPTS = ("The quick brown fox", "def main():", "1, 2, 3,", "你好")


@dataclass(frozen=True)
class PublishedPackage:
    """A package in storage."""

    digest: str
    location: str
    """For people and tools; readers find it by digest."""
    manifest: Manifest


def write_package(
    model_dir: Path,
    *,
    name: str,
    kind: Kind,
    storage: Storage,
    signer: Signer | None,
    keyset: Keyset | None = None,
    processing: Processing | None = None,
    golden_inputs: GoldenInputs | None = None,
    language_model: LanguageModelInfo | None = None,
    lineage: Lineage | None = None,
    metrics: Mapping[str, float] | None = None,
    profile: Mapping[str, JsonValue] | None = None,
    base: ModelPackage | None = None,
    parity: Mapping[str, float] | None = None,
    quantisation: Mapping[str, JsonValue] | None = None,
    require_finite: bool = False,
    work_dir: Path | None = None,
) -> PublishedPackage:
    """Publish the model in `model_dir`.

    Args:
        model_dir: a Hugging Face directory for a language model, a peft directory with a tokenizer
            for an adapter, or a directory with `model.onnx` (and its external data) for a graph.
        signer: None publishes without a signature; readers refuse it unless told otherwise.
        keyset: encrypts the package at rest; None leaves it plain, see `encrypting_keyset`.
        golden_inputs: for a graph a few samples as clients send them, for a language model a few
            prompts as text; None makes some up.
        language_model: None derives it from the model.
        base: what an adapter was trained on; its golden outputs are of both together.
        parity: how far a derived package is from its parent.
        quantisation: how its weights were made smaller, if they were.
        require_finite: whether a graph's golden outputs must be numbers, as a language model's
            always must.
        work_dir: where to stage; None stages beside the storage folder.

    Raises:
        ForbiddenFileError: pickle, code, links or other files that may not be in a package.
        PackageError: the model is not whole, its processing does not fit it, or it computes no
            numbers.
        MachineError: no space left.
    """
    check_name(name)
    if not model_dir.is_dir():
        raise MissingFileError(f"model directory '{model_dir}' does not exist", hint="check it")
    with _disk_errors(), _stage(storage, work_dir) as stage:
        package_dir = stage / "package"
        copy_files(model_dir, package_dir / MODEL_DIR)
        names = list(list_files(package_dir))
        refuse_code_references(package_dir, names)
        staged = package_dir / MODEL_DIR
        if kind == "adapter":
            described = _describe_adapter(staged, base, golden_inputs, language_model)
        else:
            described = _describe(
                staged,
                kind,
                processing or Processing(),
                golden_inputs,
                language_model,
                is_quantised=bool(quantisation),
                require_finite=require_finite,
            )
        manifest = Manifest(
            kind=kind,
            name=name,
            created_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
            files=_entries(package_dir, names),
            lineage=_lineage(lineage or Lineage(), base),
            metrics=_finite(metrics or {}),
            profile=dict(profile or {}),
            parity=dict(parity or {}),
            quantisation=dict(quantisation or {}),
            **described,
        )
        return _publish(package_dir, manifest, storage, signer, keyset)


def _lineage(given: Lineage, base: ModelPackage | None) -> Lineage:
    """An adapter derives from its base, unless it is said to come from elsewhere."""
    if base is None or given.parent_digest:
        return given
    return given.model_copy(update={"parent_digest": base.digest})


def _publish(
    package_dir: Path,
    manifest: Manifest,
    storage: Storage,
    signer: Signer | None,
    keyset: Keyset | None,
) -> PublishedPackage:
    data = manifest.to_bytes()
    if len(data) > MAX_MANIFEST_BYTES:
        raise PackageError(
            f"the manifest would have {len(data)} bytes", hint="give fewer or smaller golden inputs"
        )
    (package_dir / MANIFEST).write_bytes(data)
    if signer is not None:
        signer.sign(package_dir)
    publish(package_dir, manifest.digest, storage, keyset)
    location = storage.path(package_key(manifest.digest))
    return PublishedPackage(manifest.digest, location, manifest)


def _describe(
    model_dir: Path,
    kind: Kind,
    processing: Processing,
    golden_inputs: GoldenInputs | None,
    language_model: LanguageModelInfo | None,
    *,
    is_quantised: bool,
    require_finite: bool,
) -> dict[str, Any]:
    """The manifest's fields that depend on the model itself."""
    if kind == "graph":
        if golden_inputs is not None and not isinstance(golden_inputs, Mapping):
            raise PackageError("golden inputs of a graph are arrays by name, not prompts")
        return _describe_graph(
            model_dir,
            processing,
            golden_inputs,
            is_quantised=is_quantised,
            require_finite=require_finite,
        )
    from cluster.model_package.language_model import load_reference

    return _describe_text(
        model_dir, load_reference(model_dir), _prompts(golden_inputs), language_model
    )


def _describe_adapter(
    adapter_dir: Path,
    base: ModelPackage | None,
    golden_inputs: GoldenInputs | None,
    language_model: LanguageModelInfo | None,
) -> dict[str, Any]:
    from cluster.model_package.adapter import load_adapted

    if base is None or base.manifest.kind != "language_model":
        raise PackageError(
            "an adapter is packaged with the package of its base, a language model",
            hint="import the base first: `heliostat models import DIR --name NAME`",
        )
    model = load_adapted(base.model_dir, adapter_dir).get_base_model()
    described = _describe_text(adapter_dir, model, _prompts(golden_inputs), language_model)
    return {**described, "adapter": AdapterInfo(base_digest=base.digest)}


def _prompts(golden_inputs: GoldenInputs | None) -> Sequence[str]:
    if isinstance(golden_inputs, Mapping):
        raise PackageError("golden inputs of a language model are prompts, not arrays")
    return golden_inputs or _PROMPTS


@dataclass(frozen=True)
class _Graph:
    inputs: Any
    outputs: Any
    processing: Processing


def _describe_graph(
    model_dir: Path,
    processing: Processing,
    golden_inputs: Mapping[str, Array] | None,
    *,
    is_quantised: bool,
    require_finite: bool,
) -> dict[str, Any]:
    from cluster.model_package.golden_inputs import find_inputs
    from cluster.runtimes.onnx import OnnxRuntime

    path = model_dir / GRAPH
    if not path.is_file():
        raise MissingFileError(f"there is no {GRAPH} among the model's files", hint="name it so")
    runtime = OnnxRuntime(path)
    graph = _Graph(runtime.inputs, runtime.outputs, processing)
    check_processing(graph)
    inputs = golden_inputs if golden_inputs is not None else find_inputs(graph, runtime.run)
    computed = golden.compute_graph(
        graph,
        runtime.run,
        inputs,
        is_quantised=is_quantised,
        require_finite=require_finite,
    )
    fields = {"inputs": graph.inputs, "outputs": graph.outputs, "processing": processing}
    _check_deterministic(path, {**fields, "golden": computed})
    return {**fields, "golden": computed}


def _check_deterministic(path: Path, fields: dict[str, Any]) -> None:
    """Fresh outputs must be the golden ones, or no replica would ever pass."""
    from cluster.runtimes.onnx import OnnxRuntime

    trial = Manifest(kind="graph", name="trial", created_at="", files={}, **fields)
    golden.check_graph(trial, OnnxRuntime(path).run)


def _describe_text(
    model_dir: Path, model: Any, texts: Sequence[str], given: LanguageModelInfo | None
) -> dict[str, Any]:
    from cluster.model_package import language_model as reference
    from cluster.processing.text import TextProcessor

    info = given or reference.describe_language_model(model_dir, model)
    prompts = reference.encode_prompts(model_dir, texts, info.max_context_tokens)
    computed: Golden = golden.compute_language_model(model, prompts, info.eos_token_ids)
    if (model_dir / TOKENIZER).is_file():  # without it there is nothing that serving could read
        inputs, outputs = golden_text.compute_text(TextProcessor.load(model_dir))
        computed = computed.model_copy(
            update={
                "inputs": {**computed.inputs, **inputs},
                "outputs": {**computed.outputs, **outputs},
            }
        )
    return {"language_model": info, "golden": computed}


def _entries(package_dir: Path, names: Sequence[str]) -> dict[str, FileEntry]:
    digests = sha256_files(package_dir / name for name in names)
    return {
        path.relative_to(package_dir).as_posix(): FileEntry(
            sha256=digest, size_bytes=path.stat().st_size
        )
        for path, digest in digests.items()
    }


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """JSON has no NaN: a metric that is not a number says nothing."""
    return {name: value for name, value in metrics.items() if abs(value) < float("inf")}


@contextlib.contextmanager
def _stage(storage: Storage, work_dir: Path | None) -> Iterator[Path]:
    if work_dir is None:
        with storage.staging() as stage:
            yield stage
        return
    work_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="package-", dir=work_dir) as directory:
        yield Path(directory)


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except HeliostatError:
        raise
    except OSError as error:
        raise MachineError(
            f"the package cannot be written: {error.strerror or error}",
            hint="free disk space, or move HELIOSTAT_HOME or HELIOSTAT_STORAGE_URL",
        ) from None
