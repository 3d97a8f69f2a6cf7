"""`models`: what is in the registry, and one's own models into it.

Printing only; what the verbs do is in `cluster.registry` and `cluster.model_package`, imported when
a verb runs.
"""

from __future__ import annotations

import getpass
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.errors import NotFoundError, NotRunningError, UsageError
from cluster.model_ref import CANDIDATE, ModelRef, check_name
from cluster.settings import Settings, load_settings

if TYPE_CHECKING:
    from cluster.model_package import ModelPackage
    from cluster.registry import ModelRegistry, ModelVersion

app = typer.Typer(
    help="Model versions: import, export, list, show, verify, move aliases.", no_args_is_help=True
)

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
RefArgument = Annotated[str, typer.Argument(help="NAME, NAME@ALIAS or NAME/VERSION.")]


@app.command("import")
def import_model(
    path: Annotated[
        Path,
        typer.Argument(
            help="A Hugging Face causal-LM directory, a peft directory, or an .onnx, .skops "
            "(scikit-learn) or .safetensors file."
        ),
    ],
    name: Annotated[str, typer.Option(help="Name to register it under.")],
    base: Annotated[
        str | None, typer.Option(help="Of an adapter: the registered model it was trained on.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Package, sign and register one's own model; it becomes the name's candidate."""
    from cluster.cli.import_model import import_path

    check_name(name)
    version = import_path(
        path, name, load_settings(), say=lambda line: typer.echo(line, err=True), base=base
    )
    if as_json:
        print(json.dumps(_row(version), indent=2))
        return
    print(f"{version.ref} is registered, with alias {CANDIDATE}: {version.digest}")
    print(f"serve it:  heliostat deploy {version.ref}")


@app.command("export")
def export_model(
    ref: RefArgument,
    to: Annotated[Path, typer.Option(help="A directory that is empty or not there yet.")],
) -> None:
    """Write a version's plain files, verified, for transformers, peft or ONNX Runtime."""
    from cluster.model_package import open_version
    from cluster.model_package.unpacking import unpack

    version = _registry().resolve(ModelRef.parse(ref))
    package = open_version(version, load_settings())
    unpack(package, to)
    print(f"{version.ref} ({version.kind}) is in {to}")
    if (adapter := package.manifest.adapter) is not None:
        bases = [v for v in _registry().list_versions() if v.digest == adapter.base_digest]
        print(f"its base: {bases[0].ref if bases else adapter.base_digest}")


@app.command("list")
def list_models(
    name: Annotated[str | None, typer.Argument(help="Only this model's versions.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Every version with its aliases."""
    from cluster.cli.output import print_table

    registry = _registry()
    versions = registry.versions_of(name) if name else registry.list_versions()
    rows = [_row(version) for version in versions]
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
    from cluster.cli.model_details import print_comparison, print_details

    if other is not None:
        print_comparison([_details(ref), _details(other)], as_json=as_json)
        return
    details = _details(ref)
    _warn_of_edits(details["name"])
    if as_json:
        print(json.dumps(details, indent=2, ensure_ascii=False))
    else:
        print_details(details)


@app.command("verify")
def verify(
    target: Annotated[
        str, typer.Argument(help="NAME, NAME@ALIAS or NAME/VERSION, or a package's directory.")
    ],
    data: Annotated[
        bool, typer.Option(help="Read every file of the dataset; else its description alone.")
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Check a stored package and all it came from, down to data and commit; asks no server.

    Exit code 1 if anything is wrong; what is not here to be checked is said to be absent.
    """
    from cluster.model_package import (
        fetched,
        open_copy,
        open_keyset,
        open_trust,
        verify_directory,
    )
    from cluster.model_package.stored import ENCRYPTION
    from cluster.storage import Storage

    settings = load_settings()
    trust = open_trust(settings)
    if Path(target).is_dir():
        if (Path(target) / ENCRYPTION).exists():
            raise UsageError(
                f"'{target}' is encrypted, as packages lie in storage",
                hint="verify the version by its name: `heliostat models verify NAME/VERSION`",
            )
        package = verify_directory(Path(target), trust, allow_unsigned=settings.allow_unsigned)
        _print_verified(package, settings, data, as_json)
        return
    version = _registry().resolve(ModelRef.parse(target))
    try:
        storage = Storage.open(settings.storage_root)
        storage.require_root()
        cache, keyset = settings.package_cache_dir, open_keyset(settings)
        with fetched(version.digest, storage, cache, keyset) as copy:
            package = verify_directory(
                copy, trust, digest=version.digest, allow_unsigned=settings.allow_unsigned
            )
            _print_verified(package, settings, data, as_json)
    except NotRunningError as error:
        copied = open_copy(version.digest, settings)
        if copied is None:
            raise
        typer.echo(f"warning: {error.message}; reading this machine's copy", err=True)
        _print_verified(copied, settings, data, as_json)


@app.command("history")
def history(name: str, as_json: JsonOption = False) -> None:
    """Every move of the model's aliases, with who and why."""
    from cluster.cli.output import print_table

    registry = _registry()
    rows = [vars(change) for change in registry.history(name)]
    columns = ("at", "alias", "from_version", "to_version", "actor", "reason")
    print_table(rows, columns, as_json=as_json, empty="no alias was ever set")
    _warn_of_edits(name)


@app.command("alias")
def alias(
    name: str,
    alias: str,
    version: Annotated[int | None, typer.Argument(help="Its number.", show_default=False)] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Take the alias away instead.")] = False,
    reason: Annotated[str, typer.Option(help="Kept in the history.")] = "by hand",
) -> None:
    """Point an alias to a version by hand, or take it away; a release does it for `champion`."""
    if remove == (version is not None):
        raise UsageError(
            "an alias is moved to a version or removed", hint="give a version number, or --remove"
        )
    registry = _registry()
    registry.versions_of(name)
    if remove and registry.get_alias(name, alias) is None:
        raise NotFoundError(
            f"model '{name}' has no alias '{alias}'", hint=f"see `heliostat models list {name}`"
        )
    registry.set_alias(name, alias, version, actor=actor(), reason=reason)
    print(f"{name}@{alias} is {'removed' if remove else f'version {version}'}")


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


@app.command("rekey")
def rekey() -> None:
    """Encrypt every stored package with a new key; if that was interrupted, finish it."""
    from cluster.database import open_database
    from cluster.model_package import encrypting_keyset
    from cluster.rekeying import rekey as rekey_all
    from cluster.security.audit import AuditLog
    from cluster.storage import Storage

    settings = load_settings()
    if (keyset := encrypting_keyset(settings)) is None:
        raise UsageError(
            "packages are not encrypted here", hint="set HELIOSTAT_ENCRYPT_PACKAGES=true first"
        )
    keyset.open()
    storage = Storage.open(settings.storage_root)
    # Without its packages, a keyset would lose the keys that they need.
    storage.require_root()
    listed = {version.digest for version in _registry().list_versions()}
    say = lambda line: typer.echo(line, err=True)  # noqa: E731
    done = rekey_all(storage, keyset, listed=listed, say=say)
    detail = {"num_packages": done.num_packages, "is_new": done.is_new}
    audit = AuditLog(open_database(settings.database))
    audit.record(actor(), "packages.rekey", f"key {done.key_id}", detail)
    print(f"{done.num_packages} packages encrypted anew; all are with key {done.key_id} now")
    if not done.is_new:
        print("that finished what was left to do: run it again for a new key")


def _details(ref: str) -> dict[str, Any]:
    from cluster.cli.model_details import describe
    from cluster.model_package import open_version

    registry = _registry()
    version = registry.resolve(ModelRef.parse(ref))
    return {
        **_row(version),
        **describe(open_version(version, load_settings())),
        "evaluations": [vars(found) for found in registry.evaluations(version.digest)],
    }


def _warn_of_edits(name: str) -> None:
    try:
        for edit in _registry().foreign_edits(name):
            typer.echo(f"warning: {edit}; that moves nothing, and will be undone", err=True)
    except NotRunningError as error:
        typer.echo(f"warning: edits in MLflow are not looked for: {error.message}", err=True)


def _registry() -> ModelRegistry:
    from cluster.registry import ModelRegistry

    return ModelRegistry.open(load_settings())


def _row(version: ModelVersion) -> dict[str, Any]:
    return {**vars(version), "aliases": list(version.aliases)}


def _print_verified(package: ModelPackage, settings: Settings, data: bool, as_json: bool) -> None:
    from cluster.cli.lineage import print_lineage
    from cluster.cli.model_details import describe, print_details
    from cluster.lineage import trace

    links = list(trace(package, settings, with_data=data))
    details = {"verified": True, **describe(package), "chain": [vars(link) for link in links]}
    if as_json:
        print(json.dumps(details, indent=2, ensure_ascii=False))
        return
    print(f"verified: {package.digest}")
    print_details({k: details[k] for k in ("signer", "kind", "made_at", "files")})
    print("lineage:")
    print_lineage(links)


def actor() -> str:
    """Who types this, for histories."""
    try:
        return f"cli:{getpass.getuser()}"
    # A container's user may have no name.
    except (KeyError, OSError):
        return "cli"
