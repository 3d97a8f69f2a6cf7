"""The `heliostat` command: the verbs, and the one place where an error becomes a line.

Loads only light libraries, so `--help` is quick; each verb imports what it needs when it runs.
"""

from __future__ import annotations

import importlib.metadata
import signal
import sys
import tempfile
import traceback
from types import FrameType
from typing import Annotated, NoReturn

import typer

from cluster.cli import (
    audit,
    backup,
    cluster,
    garbage,
    jobs,
    keys,
    models,
    serving,
    signing_keys,
    usage,
)
from cluster.errors import HeliostatError, as_machine_error

app = typer.Typer(
    name="heliostat",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"heliostat {importlib.metadata.version('heliostat')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """A large model's whole life on one self-hosted Ray cluster."""


cluster.register(app)
jobs.register(app)
app.add_typer(models.app, name="models")
models.app.add_typer(signing_keys.app, name="keys")
serving.register(app)
keys.register(app)
usage.register(app)
audit.register(app)
garbage.register(app)
backup.register(app)


def main() -> None:
    """Entry point of the `heliostat` script."""
    # A verb that is told to end ends what it has begun: `up` the parts it has started.
    signal.signal(signal.SIGTERM, _stop)
    try:
        app()
    except HeliostatError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception as error:
        known = as_machine_error(error) if isinstance(error, OSError) else None
        print(f"error: {known or _describe_bug(error)}", file=sys.stderr)
        sys.exit(1)


def _stop(_number: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(128 + signal.SIGTERM)


def _describe_bug(error: Exception) -> str:
    """One line; the traceback goes to a file that a report can quote."""
    with tempfile.NamedTemporaryFile(
        "w", prefix="heliostat-error-", suffix=".txt", delete=False
    ) as file:
        traceback.print_exception(error, file=file)
    text = " ".join(str(error).split())[:200]
    return f"unexpected {type(error).__name__}: {text}; please report it with {file.name}"


if __name__ == "__main__":
    main()
