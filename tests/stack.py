"""A local stack that tests start, by the real command, on its own home and ports."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

from cluster.session.ports import PORTS, is_free
from cluster.settings import Settings

ROOT = Path(__file__).parent.parent
HELIOSTAT = Path(sys.executable).parent / "heliostat"
NUM_REPLICA_PORTS = 100


@dataclass(frozen=True)
class Stack:
    """A stack that the tests started."""

    settings: Settings

    @property
    def environment(self) -> dict[str, str]:
        """For child processes; HELIOSTAT_HOME is all that they need."""
        return {**os.environ, "HELIOSTAT_HOME": str(self.settings.home)}

    @property
    def key(self) -> str:
        """An API key of all scopes."""
        return self.settings.api_key_path.read_text(encoding="ascii").strip()

    def run_cli(
        self, *arguments: str | Path, timeout_s: float = 240
    ) -> subprocess.CompletedProcess[str]:
        """Run `heliostat ARGUMENTS` in the checkout, capturing what it prints."""
        return subprocess.run(
            [HELIOSTAT, *arguments],
            env=self.environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def run_shell(
        self, script: str, *, cwd: Path = ROOT, timeout_s: float = 240
    ) -> subprocess.CompletedProcess[str]:
        """Run a script as a user who has activated the virtual environment."""
        return subprocess.run(
            ["bash", "-c", script],
            env={
                **self.environment,
                "PATH": f"{HELIOSTAT.parent}{os.pathsep}{self.environment['PATH']}",
            },
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def up(self) -> subprocess.CompletedProcess[str]:
        """Start it with the settings that were chosen for it."""
        config = self.settings.home.parent / "settings.yaml"
        values = self.settings.model_dump(mode="json", exclude_defaults=True, exclude={"home"})
        config.write_text(yaml.safe_dump(values), encoding="utf-8")
        return self.run_cli("up", "--config", config)


def new_stack(directory: Path, num_cpus: int = 2) -> Stack:
    """A stack on free ports, not started."""
    names = [name for part in PORTS.values() for name in part]
    first = _free_block(len(names) + NUM_REPLICA_PORTS)
    ports = {name: first + offset for offset, name in enumerate(names)}
    settings = Settings(
        home=directory / "home",
        num_cpus=num_cpus,
        log_format="json",
        access_log=True,
        replica_port_min=first + len(ports),
        replica_port_count=NUM_REPLICA_PORTS,
        **ports,  # type: ignore[arg-type]
    )
    return Stack(settings)


def _free_block(size: int) -> int:
    """Below the ports that the system gives to outgoing connections."""
    while True:
        first = random.randrange(12000, 32000 - size)
        if all(is_free(port) for port in range(first, first + size)):
            return first
