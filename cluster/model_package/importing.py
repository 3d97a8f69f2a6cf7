"""Prepare somebody's own model for packaging: choose its files, refuse what is not safe to serve.

Takes a Hugging Face causal-LM directory or an ONNX file as other tools leave them, and fills a
clean directory for `write_package`. Knows nothing of storage and registry.

    prepared = prepare_import(Path("my-model"), stage)
    write_package(stage, name="mine", kind=prepared.kind, …)
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from cluster.errors import ForbiddenFileError, InputError, PackageError
from cluster.model_package.files import GRAPH, check_file_name
from cluster.model_package.manifest import Kind

_PICKLED_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")
# Below this an ONNX graph is kept in one file; protobuf allows no more than 2 GiB.
_MAX_INLINE_BYTES = 1024**3


@dataclass(frozen=True)
class PreparedImport:
    """What was made of the source."""

    kind: Kind
    notes: tuple[str, ...]
    """What was left out or changed, for the user."""


def prepare_import(source: Path, stage: Path) -> PreparedImport:
    """Fill `stage` (an empty directory) from a model directory or an `.onnx` file.

    Raises:
        InputError: there is nothing that can be imported.
        PackageError: it cannot be served safely; the hint says how to convert it.
    """
    if not source.exists():
        raise InputError(f"'{source}' does not exist", hint="check the path")
    if source.is_dir():
        return _prepare_directory(source, stage)
    if not source.is_file():
        raise InputError(f"'{source}' is no plain file", hint="point to the file itself")
    if source.suffix == ".onnx":
        return _prepare_graph(source, stage)
    if source.suffix.lower() in (*_PICKLED_WEIGHTS, ".joblib", ".pickle"):
        raise ForbiddenFileError(
            f"'{source}' is a pickle, which can run code when it is loaded",
            hint="save it as a Hugging Face directory with safetensors, or export it to ONNX",
        )
    raise InputError(
        f"'{source}' is neither a directory nor an .onnx file",
        hint="point to a Hugging Face causal-LM directory or an ONNX file",
    )


def _prepare_directory(source: Path, stage: Path) -> PreparedImport:
    chosen = language_model_files(source)
    for name in chosen:
        # A Hugging Face cache holds links to its blobs; a package holds the files themselves.
        shutil.copyfile(source / name, stage / name)
    left_out = [path for path in sorted(source.iterdir()) if path.name not in chosen]
    names = ", ".join(f"{path.name}/" if path.is_dir() else path.name for path in left_out)
    return PreparedImport("language_model", (f"left out: {names}",) if names else ())


def language_model_files(source: Path) -> list[str]:
    """Names of the files of a Hugging Face directory that make up the model; no file is opened.

    Raises:
        InputError, PackageError: they hold no model, or none that is safe to load.
    """
    names = [path.name for path in sorted(source.iterdir()) if path.is_file()]
    chosen = choose_files(str(source), names)
    for name in chosen:
        _refuse_link_elsewhere(source, source / name)
    return chosen


def choose_files(source: str, names: Sequence[str]) -> list[str]:
    """Those of a directory's files that make up the language model in it.

    Raises:
        InputError, PackageError: see `language_model_files`.
    """
    _refuse_other_models(source, set(names))
    has_shards = any(n.startswith("model") and n.endswith(".safetensors") for n in names)
    return [
        name
        for name in sorted(names)
        if _is_allowed(name) and not (has_shards and name.startswith("consolidated"))
    ]


def _refuse_link_elsewhere(source: Path, path: Path) -> None:
    """A downloaded directory must not pull other files of this machine into a package."""
    target = path.resolve()
    blobs = source.resolve().parent.parent / "blobs"
    if not (target.is_relative_to(source.resolve()) or target.parent == blobs):
        raise ForbiddenFileError(
            f"'{path}' is a link to '{target}', outside of the model's directory",
            hint="if that belongs to the model, put a copy in place of the link",
        )


def _refuse_other_models(source: str, names: set[str]) -> None:
    if "adapter_config.json" in names:
        raise PackageError(
            f"'{source}' is an adapter, which cannot be imported by itself",
            hint="merge it into its base (peft: model.merge_and_unload()) and save that",
        )
    has_weights = any(name.endswith(".safetensors") for name in names)
    pickles = sorted(n for n in names if n.endswith(_PICKLED_WEIGHTS))
    if pickles and not has_weights:
        raise ForbiddenFileError(
            f"'{source}' has its weights in '{pickles[0]}', a pickle, and none in safetensors",
            hint="load it and save it with model.save_pretrained(DIR, safe_serialization=True)",
        )
    graphs = sorted(name for name in names if name.endswith(".onnx"))
    if graphs and "config.json" not in names:
        raise InputError(
            f"'{source}' holds an ONNX graph", hint=f"import the file: '{source}/{graphs[0]}'"
        )


def _is_allowed(name: str) -> bool:
    try:
        check_file_name(name)
    except ForbiddenFileError:
        return False
    return not name.endswith((".onnx", ".data"))


def _prepare_graph(source: Path, stage: Path) -> PreparedImport:
    import onnx

    try:
        model = onnx.load(source, load_external_data=False)
    # protobuf raises its own type on anything that is not a graph.
    except Exception as error:
        raise PackageError(
            f"'{source}' is not an ONNX graph ({type(error).__name__})", hint="export it again"
        ) from None
    locations = _external_files(model)
    if not locations:
        shutil.copyfile(source, stage / GRAPH)
        return PreparedImport("graph", ())
    total = source.stat().st_size + sum(_size(source, location) for location in locations)
    try:
        onnx.load_external_data_for_model(model, str(source.parent))
    # ValueError, onnx's own ValidationError and more, on links, offsets and sizes.
    except Exception as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise PackageError(
            f"'{source}': its tensors cannot be read: {first_line}", hint="export it again"
        ) from None
    inline = total < _MAX_INLINE_BYTES
    onnx.save_model(
        model,
        stage / GRAPH,
        save_as_external_data=not inline,
        location=f"{GRAPH}.data",
        all_tensors_to_one_file=True,
    )
    where = f"into {GRAPH}" if inline else f"into {GRAPH}.data"
    return PreparedImport("graph", (f"joined: {', '.join(locations)} {where}",))


def _external_files(model: Any) -> list[str]:
    """Files that hold the graph's tensors, as the graph names them."""
    from onnx.external_data_helper import uses_external_data

    found: set[str] = set()
    for tensor in _tensors(model.graph):
        if uses_external_data(tensor):
            found.update(entry.value for entry in tensor.external_data if entry.key == "location")
    return sorted(found)


def _tensors(graph: Any) -> Iterator[Any]:
    """Weights and constants, those of branches and loops included."""
    yield from graph.initializer
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        for inner in [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]:
            yield from _tensors(inner)


def _size(source: Path, location: str) -> int:
    path = PurePosixPath(location)
    if path.is_absolute() or ".." in path.parts:
        raise ForbiddenFileError(
            f"'{source}' keeps tensors in {location!r}, outside its own directory",
            hint="save it again with its data beside it",
        )
    try:
        return (source.parent / path).stat().st_size
    except (OSError, ValueError):
        raise PackageError(
            f"'{source}' keeps tensors in {location!r}, which is missing",
            hint="copy that file beside the graph",
        ) from None
