"""Prepare somebody's own model for packaging: choose its files, refuse what is not safe to serve.

Takes what other tools leave: a Hugging Face causal-LM directory, a peft directory, an ONNX file, a
scikit-learn estimator saved with skops; and fills a clean directory for `write_package`. Knows
nothing of storage and registry.

    prepared = prepare_import(Path("my-model"), stage)
    write_package(stage, name="mine", kind=prepared.kind, …)
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import JsonValue

from cluster.errors import (
    ForbiddenFileError,
    InputError,
    MissingFileError,
    PackageError,
    first_line,
)
from cluster.model_package.files import ADAPTER_CONFIG, GRAPH, TOKENIZER, check_file_name
from cluster.model_package.manifest import Kind
from cluster.model_package.reader import ModelPackage
from cluster.processing import Array, Processing

_PICKLED_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")
_PICKLES = (".pkl", ".pickle", ".joblib")
# What an adapter that comes without a tokenizer takes over from its base.
_TOKENIZER_FILES = (
    TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja",
)  # fmt: skip
# Below this an ONNX graph is kept in one file; protobuf allows no more than 2 GiB.
_MAX_INLINE_BYTES = 1024**3


@dataclass(frozen=True)
class PreparedImport:
    """What was made of the source."""

    kind: Kind
    notes: tuple[str, ...]
    """What was left out or changed, for the user."""
    processing: Processing | None = None
    golden_inputs: dict[str, Array] | None = None
    profile: dict[str, JsonValue] = field(default_factory=dict)
    parity: dict[str, float] = field(default_factory=dict)
    """Of a converted model: how far it is from what it was converted from."""


def prepare_import(source: Path, stage: Path, base: ModelPackage | None = None) -> PreparedImport:
    """Fill `stage` (an empty directory) from a model directory or a single file.

    Args:
        base: what an adapter was trained on.

    Raises:
        InputError: there is nothing that can be imported.
        PackageError: it cannot be served safely; the hint says how to convert it.
    """
    if not source.exists():
        raise InputError(f"'{source}' does not exist", hint="check the path")
    if source.is_dir() and (source / ADAPTER_CONFIG).is_file():
        return _prepare_adapter(source, stage, base)
    if base is not None:
        raise InputError(
            f"'{source}' is no adapter, and only those have a base",
            hint="leave --base out, or point to a peft directory",
        )
    if source.is_dir():
        return _prepare_directory(source, stage)
    if not source.is_file():
        raise InputError(f"'{source}' is no plain file", hint="point to the file itself")
    return _prepare_file(source, stage)


def _prepare_file(source: Path, stage: Path) -> PreparedImport:
    suffix = source.suffix.lower()
    if suffix == ".onnx":
        return _prepare_graph(source, stage)
    if suffix == ".skops":
        return _prepare_estimator(source, stage)
    if suffix == ".safetensors":
        return _prepare_weights(source, stage)
    if suffix in (*_PICKLED_WEIGHTS, *_PICKLES):
        raise ForbiddenFileError(
            f"'{source}' is a pickle, which can run code when it is loaded",
            hint="a scikit-learn estimator: where you trust it, load it and save it with "
            "skops.io.dump(model, 'model.skops'); a network: save it as a Hugging Face directory "
            "with safetensors, or export it to ONNX",
        )
    raise InputError(
        f"'{source}' is no model that can be imported",
        hint="point to a Hugging Face causal-LM directory, a peft directory, or an .onnx, .skops "
        "or .safetensors file",
    )


def _prepare_estimator(source: Path, stage: Path) -> PreparedImport:
    from cluster.model_package.sklearn_estimator import convert_estimator

    converted = convert_estimator(source, stage / GRAPH)
    return PreparedImport(
        "graph",
        converted.notes,
        processing=converted.processing,
        golden_inputs=converted.golden_inputs,
        profile=converted.profile,
        parity=converted.parity,
    )


def _prepare_weights(source: Path, stage: Path) -> PreparedImport:
    """A Hugging Face directory, named by its weights; only those are taken."""
    directory = source.parent
    if not (directory / "config.json").is_file():
        raise MissingFileError(
            f"'{source}' holds tensors alone, and there is no config.json beside it",
            hint="put the model's config.json and tokenizer into the same directory",
        )
    if source.name.startswith("model"):
        return _prepare_directory(directory, stage)
    chosen = [name for name in language_model_files(directory) if ".safetensors" not in name]
    _refuse_link_elsewhere(directory, source)
    shutil.copyfile(source, stage / "model.safetensors")
    return _copy_chosen(directory, chosen, stage, (source.name,))


def _prepare_adapter(source: Path, stage: Path, base: ModelPackage | None) -> PreparedImport:
    if base is None:
        raise PackageError(
            f"'{source}' is an adapter, which computes nothing without its base",
            hint="import that first and name it, --base NAME; or merge it (peft: "
            "model.merge_and_unload()) and import the whole model",
        )
    names = [path.name for path in sorted(source.iterdir()) if path.is_file()]
    _refuse_pickled_weights(str(source), names)
    chosen = [name for name in names if _is_allowed(name)]
    for name in chosen:
        _refuse_link_elsewhere(source, source / name)
    prepared = _copy_chosen(source, chosen, stage)
    if TOKENIZER in chosen:
        return PreparedImport("adapter", prepared.notes)
    borrowed = [name for name in _TOKENIZER_FILES if (base.model_dir / name).is_file()]
    for name in borrowed:
        shutil.copyfile(base.model_dir / name, stage / name)
    return PreparedImport("adapter", (*prepared.notes, "it has no tokenizer: its base's is taken"))


def _prepare_directory(source: Path, stage: Path) -> PreparedImport:
    return _copy_chosen(source, language_model_files(source), stage)


def _copy_chosen(
    source: Path, chosen: Sequence[str], stage: Path, taken: Sequence[str] = ()
) -> PreparedImport:
    """`taken` is in the stage already."""
    for name in chosen:
        # A Hugging Face cache holds links to its blobs; a package holds the files themselves.
        shutil.copyfile(source / name, stage / name)
    left_out = [p for p in sorted(source.iterdir()) if p.name not in {*chosen, *taken}]
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
    if ADAPTER_CONFIG in names:
        raise PackageError(
            f"'{source}' is an adapter, expected a whole model",
            hint="merge it into its base (peft: model.merge_and_unload()) and save that",
        )
    _refuse_pickled_weights(source, names)
    graphs = sorted(name for name in names if name.endswith(".onnx"))
    if graphs and "config.json" not in names:
        raise InputError(
            f"'{source}' holds an ONNX graph", hint=f"import the file: '{source}/{graphs[0]}'"
        )


def _refuse_pickled_weights(source: str, names: Collection[str]) -> None:
    has_weights = any(name.endswith(".safetensors") for name in names)
    pickles = sorted(n for n in names if n.endswith(_PICKLED_WEIGHTS))
    if pickles and not has_weights:
        raise ForbiddenFileError(
            f"'{source}' has its weights in '{pickles[0]}', a pickle, and none in safetensors",
            hint="load it and save it with model.save_pretrained(DIR, safe_serialization=True)",
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
        raise PackageError(
            f"'{source}': its tensors cannot be read: {first_line(error)}", hint="export it again"
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
