"""`models`: what is in the registry, and one's own models into it.

Printing only; what the verbs do is in `cluster.registry` and `cluster.model_package`, imported when
a verb runs.
"""

from __future__ import annotations

import contextlib
import getpass
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.errors import NotRunningError, UsageError
from cluster.model_ref import CANDIDATE, ModelRef, check_name
from cluster.settings import load_settings

if TYPE_CHECKING:
    from cluster.model_package import ModelPackage
    from cluster.registry import ModelRegistry, ModelVersion

app = typer.Typer(
    help="Model versions: import, list, show, verify, move aliases.", no_args_is_help=True
)

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
RefArgument = Annotated[str, typer.Argument(help="NAME, NAME@ALIAS or NAME/VERSION.")]


@app.command("import")
def import_model(
    path: Annotated[
        Path, typer.Argument(help="A Hugging Face causal-LM directory or an .onnx file.")
    ],
    name: Annotated[str, typer.Option(help="Name to register it under.")],
    as_json: JsonOption = False,
) -> None:
    """Package, sign and register one's own model; it becomes the name's candidate."""
    from cluster.cli.import_model import import_path

    check_name(name)
    version = import_path(path, name, load_settings(), say=lambda line: typer.echo(line, err=True))
    if as_json:
        print(json.dumps(_row(version), indent=2))
        return
    print(f"{version.ref} is registered, with alias {CANDIDATE}: {version.digest}")
    print(f"serve it:  heliostat deploy {version.ref}")


@app.command("list")
def list_models(
    name: Annotated[str | None, typer.Argument(help="Only this model's versions.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Every version with its aliases."""
    from cluster.cli.output import print_table

    rows = [_row(version) for version in _registry().list_versions(name)]
    shown = rows if as_json else [{**row, "digest": row["digest"][:19]} for row in rows]
    columns = ("name", "version", "aliases", "kind", "created_at", "digest")
    print_table(shown, columns, as_json=as_json, empty="no models: `heliostat models import`")


@app.command("show")
def show(
    ref: RefArgument,
    other: Annotated[
        str | None, typer.Argument(help="A second one, to compare its metrics side by side.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """A version's origin, interface, metrics and files, from its verified package."""
    if other is not None:
        _compare([_details(ref), _details(other)], as_json)
        return
    details = _details(ref)
    if as_json:
        print(json.dumps(details, indent=2, ensure_ascii=False))
    else:
        _print_details(details)


@app.command("verify")
def verify(
    target: Annotated[
        str, typer.Argument(help="NAME, NAME@ALIAS or NAME/VERSION, or a package's directory.")
    ],
    as_json: JsonOption = False,
) -> None:
    """Check signature, digests and files of a stored package; exit code 1 if anything is wrong."""
    from cluster.model_package import TrustStore, fetched, open_version, verify_directory
    from cluster.storage import Storage

    settings = load_settings()
    trust = TrustStore(settings.keys_dir)
    if Path(target).is_dir():
        package = verify_directory(Path(target), trust, allow_unsigned=settings.allow_unsigned)
        _print_verified(package, as_json)
        return
    version = _registry().resolve(ModelRef.parse(target))
    storage = Storage.open(settings.storage_root)
    try:
        with fetched(version.digest, storage, settings.package_cache_dir) as copy:
            package = verify_directory(
                copy, trust, digest=version.digest, allow_unsigned=settings.allow_unsigned
            )
            _print_verified(package, as_json)
    except NotRunningError as error:
        # The reader verifies its own copy again; without one, this error is what there is to say.
        typer.echo(f"warning: {error.message}; reading this machine's copy", err=True)
        _print_verified(open_version(version, settings), as_json)


@app.command("history")
def history(name: str, as_json: JsonOption = False) -> None:
    """Every move of the model's aliases, with who and why."""
    from cluster.cli.output import print_table

    registry = _registry()
    rows = [vars(change) for change in registry.history(name)]
    columns = ("at", "alias", "from_version", "to_version", "actor", "reason")
    print_table(rows, columns, as_json=as_json, empty="no alias was ever set")
    with contextlib.suppress(NotRunningError):
        for edit in registry.foreign_edits(name):
            typer.echo(f"warning: {edit}; that moves nothing, and will be undone", err=True)


@app.command("alias")
def alias(
    name: str,
    alias: str,
    version: int,
    reason: Annotated[str, typer.Option(help="Kept in the history.")] = "by hand",
) -> None:
    """Point an alias to a version by hand; a release does it for `champion`."""
    _registry().set_alias(name, alias, version, actor=_actor(), reason=reason)
    print(f"{name}@{alias} is version {version}")


@app.command("delete")
def delete(
    ref: Annotated[str, typer.Argument(help="NAME/VERSION.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove a version that no alias points to, and its package."""
    wanted = ModelRef.parse(ref)
    if wanted.version is None:
        raise UsageError(f"'{ref}' does not name one version", hint="write NAME/VERSION")
    registry = _registry()
    registry.resolve(wanted)
    if not yes:
        typer.confirm(f"delete {wanted} and its package for good?", abort=True)
    registry.delete_version(wanted.name, wanted.version)
    print(f"{wanted} is deleted")


def _details(ref: str) -> dict[str, Any]:
    from cluster.model_package import open_version

    version = _registry().resolve(ModelRef.parse(ref))
    return {**_row(version), **_describe(open_version(version, load_settings()))}


def _compare(versions: list[dict[str, Any]], as_json: bool) -> None:
    """Metrics and size of two versions, and the difference of the second to the first."""
    from cluster.cli.output import print_table

    first, second = versions
    labels = [f"{version['name']}/{version['version']}" for version in versions]
    values = [
        {**version["metrics"], "size_mb": sum(version["files"].values()) / 1e6}
        for version in versions
    ]
    rows = []
    for metric in sorted(values[0].keys() | values[1].keys()):
        a, b = (found.get(metric) for found in values)
        row: dict[str, Any] = {"metric": metric, labels[0]: a, labels[1]: b}
        row["difference"] = b - a if a is not None and b is not None else None
        rows.append(row)
    shown = rows if as_json else [{k: _number(v) for k, v in row.items()} for row in rows]
    columns = ("metric", *dict.fromkeys(labels), "difference")
    print_table(shown, columns, as_json=as_json, empty="neither has metrics")
    datasets = {version["lineage"]["dataset_digest"] for version in (first, second)}
    if len(datasets) > 1 and not as_json:
        print("they were measured on different datasets")


def _number(value: Any) -> Any:
    return f"{value:.5g}" if isinstance(value, float) else value


def _registry() -> ModelRegistry:
    from cluster.registry import ModelRegistry

    return ModelRegistry.open(load_settings())


def _row(version: ModelVersion) -> dict[str, Any]:
    return {**vars(version), "aliases": list(version.aliases)}


def _describe(package: ModelPackage) -> dict[str, Any]:
    from cluster.processing import public_inputs, public_outputs

    manifest = package.manifest
    model = manifest.language_model
    return {
        "digest": package.digest,
        "signer": package.signer,
        "kind": manifest.kind,
        "made_at": manifest.created_at,
        "lineage": manifest.lineage.model_dump(),
        "language_model": model.model_dump(mode="json") if model else None,
        "inputs": [str(spec) for spec in public_inputs(manifest)],
        "outputs": [str(spec) for spec in public_outputs(manifest)],
        "metrics": manifest.metrics,
        "files": {name: entry.size_bytes for name, entry in sorted(manifest.files.items())},
    }


def _print_verified(package: ModelPackage, as_json: bool) -> None:
    details = {"verified": True, **_describe(package)}
    if as_json:
        print(json.dumps(details, indent=2, ensure_ascii=False))
        return
    print(f"verified: {package.digest}")
    _print_details({k: details[k] for k in ("signer", "kind", "made_at", "lineage", "files")})


def _print_details(details: dict[str, Any]) -> None:
    """Nested values below their name; what is empty is left out."""
    for name, value in details.items():
        label = name.replace("_", " ")
        if isinstance(value, dict):
            filled = {key: item for key, item in value.items() if item not in ("", None)}
            if filled:
                print(f"{label}:")
                for key, item in filled.items():
                    if name == "files":
                        print(f"  {key}: {item:,} bytes")
                    else:
                        print(f"  {key.replace('_', ' ')}: {item}")
        elif isinstance(value, list):
            if value:
                print(f"{label}: {', '.join(str(item) for item in value)}")
        elif value not in ("", None):
            print(f"{label}: {value}")


def _actor() -> str:
    try:
        return f"cli:{getpass.getuser()}"
    # A container's user may have no name.
    except (KeyError, OSError):
        return "cli"
