"""Where things are on this machine: the only reader of the environment.

Values come, strongest first, from `HELIOSTAT_*` variables, from `settings.json` in the home
directory (written by `heliostat up --config F`), and from the defaults below.

    settings = Settings()
    settings.gateway_url     # 'http://127.0.0.1:8000'
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from cluster.config import parse_config, read_mapping, refuse_truth_for_numbers
from cluster.errors import ConfigError

_PREFIX = "HELIOSTAT_"
_DEFAULT_HOME = Path(".heliostat")
SETTINGS_FILE = "settings.json"
LOOPBACK = "127.0.0.1"
# Never stored: they differ between the processes that share a home.
_OF_ONE_PROCESS = {"home", "git_commit", "api_key"}


class Settings(BaseSettings):
    """Everything a process needs to find the other parts."""

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX, env_ignore_empty=True, frozen=True, extra="forbid"
    )

    home: Path = _DEFAULT_HOME
    """Directory that holds all state; made absolute."""
    host: str = "127.0.0.1"
    """Address the gateway, gRPC and the dashboard bind to, which all ask for a key or a token;
    everything else stays on loopback."""
    gateway_port: int = Field(8000, ge=1, le=65535)
    grpc_port: int = Field(9000, ge=1, le=65535)
    mlflow_port: int = Field(5000, ge=1, le=65535)
    dashboard_port: int = Field(8265, ge=1, le=65535)
    ray_port: int = Field(6379, ge=1, le=65535)
    """Port of Ray's control store (GCS)."""
    dashboard_metrics_port: int = Field(8266, ge=1, le=65535)
    """Port on which the Ray dashboard exports its own Prometheus metrics."""
    haproxy_stats_port: int = Field(8404, ge=1, le=65535)
    haproxy_metrics_port: int = Field(9101, ge=1, le=65535)
    proxy_port: int = Field(8500, ge=1, le=65535)
    """Port of Ray Serve's own fallback proxy, behind HAProxy."""
    replica_port_min: int = Field(30000, ge=1024, le=65535)
    """First of the `replica_port_count` loopback ports that Serve's ingress replicas may take."""
    replica_port_count: int = Field(1000, ge=10)
    num_cpus: int | None = Field(None, ge=1)
    """CPUs that Ray may schedule on; None counts this machine's."""
    num_gpus: int | None = Field(None, ge=0)
    """GPUs that Ray may schedule on; None counts this machine's."""
    object_store_bytes: int = Field(512 * 1024**2, ge=80 * 1024**2)
    gateway_replicas: int = Field(1, ge=1)
    max_connections: int = Field(4096, ge=1)
    """Connections to the gateway at once; more wait to be accepted."""
    max_connections_per_client: int = Field(1024, ge=1)
    """Of these, from one address; more are closed at once. A proxy of your own is one address."""
    storage_url: str = ""
    """Root for packages, datasets and checkpoints: a folder or s3://bucket/prefix; empty means
    `home/storage`."""
    database_url: str = ""
    """SQLAlchemy URL; empty means SQLite in `home`."""
    mlflow_tracking_uri: str = ""
    """Empty means the MLflow server that `up` starts."""
    allow_unsigned: bool = False
    """Deploy packages without a signature. Only ever for experiments."""
    encrypt_packages: bool = False
    """Encrypt model packages in storage."""
    encryption_keyset: str = ""
    """Tink keyset (JSON) that packages are encrypted with; empty means
    `home/keys/encryption_keyset.json`, which `up` makes."""
    log_format: Literal["text", "json"] = "text"
    """How our processes write their logs."""
    access_log: bool = False
    """One line in the gateway's log for each request."""
    metrics_port: int = Field(8267, ge=1, le=65535)
    """Port on which each Ray node exports Prometheus metrics, ours among them; on loopback."""
    metrics_tenants: int = Field(20, ge=0, le=1000)
    """Tenants that metrics tell apart, the oldest first; the others are together "other"."""
    otlp_endpoint: str = ""
    """Where traces are sent over OTLP/HTTP, e.g. http://127.0.0.1:4318; empty sends none."""
    trace_ratio: float = Field(1.0, ge=0, le=1)
    """Share of the requests that are traced."""
    api_key: str = ""
    """Key that the command line sends to the gateway; empty means the local one."""
    git_commit: str = ""
    """Commit of the code a job runs, set by `heliostat submit`."""

    @field_validator("home")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        if not _may_be_path(value):
            raise ValueError("input should be a path")
        return _expanded(value).absolute()

    @model_validator(mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, values: Any) -> Any:
        return refuse_truth_for_numbers(cls, values)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        home = init_settings().get("home") or env_settings().get("home") or _DEFAULT_HOME
        # What cannot be a path is reported when the values are validated.
        stored = _read_stored(Path(home)) if _may_be_path(home) else {}
        return (
            init_settings,
            env_settings,
            InitSettingsSource(settings_cls, init_kwargs=stored),
        )

    @property
    def source_dir(self) -> Path:
        """The checkout (or image directory) that this code runs from."""
        return Path(__file__).resolve().parents[1]

    @property
    def gateway_url(self) -> str:
        return f"http://{_reachable(self.host)}:{self.gateway_port}"

    @property
    def grpc_address(self) -> str:
        """HOST:PORT of the gateway's gRPC, as clients take it."""
        return f"{_reachable(self.host)}:{self.grpc_port}"

    @property
    def dashboard_url(self) -> str:
        return f"http://{_reachable(self.host)}:{self.dashboard_port}"

    @property
    def tracking_uri(self) -> str:
        return self.mlflow_tracking_uri or f"http://{LOOPBACK}:{self.mlflow_port}"

    @property
    def storage_root(self) -> str:
        return self.storage_url or str(self.home / "storage")

    @property
    def database(self) -> str:
        return self.database_url or f"sqlite:///{self.home / 'heliostat.db'}"

    @property
    def keys_dir(self) -> Path:
        """Directory, mode 0700: signing key, trusted public keys, Ray token, local API key."""
        return self.home / "keys"

    @property
    def ray_token_path(self) -> Path:
        return self.keys_dir / "ray_token"

    @property
    def api_key_path(self) -> Path:
        return self.keys_dir / "api_key"

    @property
    def package_cache_dir(self) -> Path:
        """Where verified packages are unpacked; only the reader writes there."""
        return self.home / "cache" / "packages"

    @property
    def log_dir(self) -> Path:
        return self.home / "logs"


def load_settings(**values: Any) -> Settings:
    """`Settings(**values)`, with a wrong value reported as one line."""
    try:
        return Settings(**values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        if not name:
            # Not with the values: a database's URL may hold a password.
            raise ConfigError(f"settings: {first['msg']}", hint="correct that one") from None
        raise ConfigError(
            f"setting '{name}' is {first.get('input')!r}: {first['msg']}",
            hint=f"correct {_PREFIX}{name.upper()} or the file given to `heliostat up --config`",
        ) from None


def load_settings_file(path: Path) -> Settings:
    """Settings with the keys of a YAML file; `HELIOSTAT_*` variables still win.

    Raises:
        ConfigError: one line naming the file and the key.
    """
    values = read_mapping(path)
    parse_config(values, Settings, source=str(path), hint="correct that key")
    in_environment = {name.lower().removeprefix(_PREFIX.lower()) for name in os.environ}
    return load_settings(**{key: values[key] for key in values.keys() - in_environment})


def environment_for_children(settings: Settings) -> dict[str, str]:
    """This process's environment plus what a child needs to find the same state.

    Other `HELIOSTAT_*` variables are left out: the child reads what `store_settings` wrote.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(_PREFIX)}
    return {**inherited, f"{_PREFIX}HOME": str(settings.home)}


def store_settings(settings: Settings) -> None:
    """Write what deviates from the defaults to `settings.json`, so that every process agrees."""
    path = settings.home / SETTINGS_FILE
    staged = path.with_suffix(".tmp")
    staged.touch(mode=0o600)  # a database URL may hold a password
    staged.write_text(json.dumps(_deviations(settings), indent=2) + "\n", encoding="utf-8")
    staged.replace(path)


def changed_settings(settings: Settings) -> list[str]:
    """Names of the settings that differ from the stored ones."""
    stored, current = _read_stored(settings.home), _deviations(settings)
    names = stored.keys() | current.keys()
    return sorted(name for name in names if stored.get(name) != current.get(name))


def _deviations(settings: Settings) -> dict[str, Any]:
    return settings.model_dump(mode="json", exclude_defaults=True, exclude=_OF_ONE_PROCESS)


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:  # no such user, or none has a home
        raise ConfigError(
            f"the home of '{path}' cannot be found", hint="write it out in HELIOSTAT_HOME"
        ) from None


def _may_be_path(value: Any) -> bool:
    return isinstance(value, (str, Path)) and "\0" not in str(value)


def _reachable(host: str) -> str:
    return LOOPBACK if host in ("0.0.0.0", "") else host  # noqa: S104


def _read_stored(home: Path) -> dict[str, Any]:
    path = _expanded(home) / SETTINGS_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"settings file '{path}' cannot be read: {error}",
            hint="delete it; `heliostat up` writes it anew",
        ) from None
    if not isinstance(values, dict):
        raise ConfigError(f"settings file '{path}' holds no mapping", hint="delete it")
    return values
