"""`backup` and `restore`: the whole state in one file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.settings import load_settings

if TYPE_CHECKING:
    from cluster.backup import BackupIndex


def register(app: typer.Typer) -> None:
    app.command("backup")(write)
    app.command("restore")(restore)


def write(path: Annotated[Path, typer.Argument(help="A file that does not exist yet.")]) -> None:
    """Write all state into one file: registry, packages, runs, MLflow, keys. Keep it secret."""
    from cluster.backup import write_backup
    from cluster.model_package import open_keyset

    settings = load_settings()
    index = write_backup(settings, path.absolute())
    print(f"wrote {path}: {_describe(index)}")
    print("it holds the signing, encryption and API keys: keep it where only you can read it")
    keyset = open_keyset(settings).path.absolute()
    if keyset.exists() and not keyset.is_relative_to(settings.keys_dir):
        typer.echo(
            f"warning: not in it: {keyset}; without that, encrypted packages are lost", err=True
        )


def restore(path: Annotated[Path, typer.Argument(help="A file that `backup` wrote.")]) -> None:
    """Put a backup's state into an empty HELIOSTAT_HOME, after verifying all of it."""
    from cluster.restore import restore_backup

    home = load_settings().home
    index = restore_backup(path.absolute(), home, lambda directory: load_settings(home=directory))
    print(f"restored {home}: {_describe(index)}")
    print("start it: heliostat up")


def _describe(index: BackupIndex) -> str:
    size_bytes = sum(member.size_bytes for member in index.members.values())
    return f"{len(index.members)} files, {size_bytes / 1e6:,.1f} MB, state of {index.created_at}"
