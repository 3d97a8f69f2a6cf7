"""What `model.base` names, as a directory on this machine that is safe to load.

A registered version is opened through the verified reader. A Hugging Face directory is held to what
`models import` asks of one: safetensors, no pickles, no code; one in an object store is fetched
first. It knows nothing of training.

    base = find_base("pydoc-lm@champion", settings)
    base.directory, base.reference, base.digest      # …/model, 'pydoc-lm/3', 'sha256:…'
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import HeliostatError, InputError, InvalidReferenceError, NotFoundError
from cluster.model_package import ModelPackage, open_version
from cluster.model_package.importing import choose_files, language_model_files
from cluster.model_package.language_model import check_language_model_files
from cluster.model_ref import ModelRef
from cluster.model_versions import ModelVersion, require_language_model
from cluster.registry import ModelRegistry
from cluster.settings import Settings
from cluster.storage import open_filesystem

_PARAM = "model.base"
_PATH_BEGINNINGS = ("/", "./", "../", "~")


@dataclass(frozen=True)
class Base:
    """A language model to go on from."""

    reference: str
    """As it was given, but for an alias: that becomes the version it means now."""
    directory: Path
    """A Hugging Face directory."""
    digest: str
    """Of the package, or of the directory's files."""
    package: ModelPackage | None = None
    """What holds it, for a registered version."""


def find_base(reference: str, settings: Settings) -> Base:
    """Raises HeliostatError if there is no model, or none that is safe to load."""
    if "://" in reference:
        return _fetched(reference, settings.home / "cache" / "bases")
    version = as_version(reference)
    if version is not None:
        return _registered(version, settings)
    return _in_directory(reference, Path(reference).expanduser())


def as_version(reference: str) -> ModelRef | None:
    """The registered version that it names; None for a path or a URL."""
    if reference.startswith(_PATH_BEGINNINGS):
        return None
    with contextlib.suppress(InvalidReferenceError):
        return ModelRef.parse(reference)
    return None


def _registered(wanted: ModelRef, settings: Settings) -> Base:
    try:
        version = ModelRegistry.open(settings).resolve(wanted)
    except NotFoundError as error:
        raise NotFoundError(
            f"model.base: {error.message}",
            hint=f"{error.hint}; a directory is written ./{wanted.name}",
            param=_PARAM,
        ) from None
    hint = "name its merged model, or the base" if version.kind == "adapter" else "name another"
    require_language_model(version, _PARAM, hint=hint, param=_PARAM)
    return open_registered(version, settings)


def open_registered(version: ModelVersion, settings: Settings) -> Base:
    """A version that is a language model; raises PackageError if it cannot be trusted."""
    package = open_version(version, settings)
    return Base(str(version.ref), package.model_dir, package.digest, package)


def _in_directory(reference: str, directory: Path) -> Base:
    if not directory.is_dir():
        raise InputError(
            f"model.base '{reference}' is neither a directory nor the name of a model",
            hint="write NAME@ALIAS, NAME/VERSION, a path or s3://BUCKET/PREFIX",
            param=_PARAM,
        )
    names = language_model_files(directory)
    check_language_model_files(directory, names)
    return Base(reference, directory.absolute(), _digest_of(directory, names))


def _digest_of(directory: Path, names: Sequence[str]) -> str:
    total = hashlib.sha256()
    for name in names:
        with (directory / name).open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        total.update(f"{name}\0{digest}\n".encode())
    return f"sha256:{total.hexdigest()}"


def _fetched(url: str, cache_dir: Path) -> Base:
    """A directory of an object store, from a copy that is made again when a file there changes."""
    shown = url.partition("?")[0]
    with _errors_named(shown):
        filesystem, path = open_filesystem(url)
        infos = _list_files(filesystem, path)
    if not infos:
        raise InputError(
            f"model.base '{shown}' holds no files", hint="correct the bucket and path", param=_PARAM
        )
    chosen = choose_files(shown, list(infos))
    state = [[name, infos[name].size, infos[name].mtime_ns] for name in chosen]
    key = hashlib.sha256(json.dumps([url, state]).encode()).hexdigest()
    copy = cache_dir / key
    if not copy.is_dir():
        with _staged(copy) as stage, _errors_named(shown):
            _copy(filesystem, {name: infos[name].path for name in chosen}, stage)
            check_language_model_files(stage, chosen)
    return Base(url, copy, _digest_of(copy, chosen))


def _list_files(filesystem: Any, path: str) -> dict[str, Any]:
    """What lies directly in a directory, by name."""
    from pyarrow import fs

    found = filesystem.get_file_info(fs.FileSelector(path, recursive=False))
    return {info.base_name: info for info in found if info.type == fs.FileType.File}


def _copy(filesystem: Any, paths: dict[str, str], target: Path) -> None:
    from pyarrow import fs

    for name, path in paths.items():
        fs.copy_files(path, str(target / name), source_filesystem=filesystem)


@contextlib.contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """A directory that appears at `target` whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=".incoming-", dir=target.parent))
    try:
        yield stage
        # Fails if another process was faster, whose copy is as good.
        with contextlib.suppress(OSError):
            stage.rename(target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


@contextlib.contextmanager
def _errors_named(shown: str) -> Iterator[None]:
    try:
        yield
    except HeliostatError:
        raise
    except OSError as error:
        reason = (error.strerror or str(error)).splitlines()[0]
        raise InputError(
            f"model.base '{shown}' cannot be read: {reason}",
            hint="check the bucket, the path and the credentials (AWS_ACCESS_KEY_ID, …)",
            param=_PARAM,
        ) from None
