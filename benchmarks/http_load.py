"""One HTTP request over and over, on many connections: wrk, so that the client costs little.

load = HttpLoad(url, body, headers)
figures = load.run(connections=64, seconds=5)
figures.requests_per_s, figures.p50_ms
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

_SCRIPT = """
wrk.method = "POST"
wrk.body = [==[%s]==]
%s
done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format(
    '\\n{"requests": %%d, "seconds": %%f, "failed": %%d, "p50_ms": %%f, "p99_ms": %%f}\\n',
    summary.requests, summary.duration / 1e6,
    e.connect + e.read + e.write + e.status + e.timeout,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3))
end
"""


@dataclass(frozen=True)
class Figures:
    """What one run measured."""

    requests: int
    seconds: float
    failed: int
    p50_ms: float
    p99_ms: float

    @property
    def requests_per_s(self) -> float:
        return self.requests / self.seconds


@dataclass(frozen=True)
class HttpLoad:
    """A POST to repeat."""

    url: str
    body: bytes
    headers: dict[str, str]

    def run(self, *, connections: int, seconds: float) -> Figures:
        """Send it for so long, closed loop.

        Raises:
            RuntimeError: wrk is missing, or answers other than 2xx came.
        """
        if shutil.which("wrk") is None:
            raise RuntimeError("wrk is missing; install it, e.g. apt-get install wrk")
        headers = {"content-type": "application/json", **self.headers}
        lines = "\n".join(f'wrk.headers["{name}"] = "{value}"' for name, value in headers.items())
        with tempfile.TemporaryDirectory() as directory:
            script = Path(directory) / "load.lua"
            script.write_text(_SCRIPT % (self.body.decode(), lines), encoding="utf-8")
            command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds:g}s", "--timeout", "30s"]
            found = subprocess.run(
                [*command, "-s", script, self.url], capture_output=True, text=True, check=True
            )
        figures = Figures(**json.loads(found.stdout.strip().splitlines()[-1]))
        if figures.failed or not figures.requests:
            raise RuntimeError(f"{self.url}: {figures.failed} of {figures.requests} failed")
        return figures
