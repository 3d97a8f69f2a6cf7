"""An engine alone in a process: `EngineChild` starts it, asks for runs and reads their figures.

with EngineChild("native", model_dir, num_threads=2) as child:
    figures = child.run(load)
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.llm_peers.completions_load import Load
from benchmarks.llm_peers.figures import Figures, StreamTimes, figures_of


class EngineChild:
    """The process; stopped while it is not its turn, for an idle engine may look for work."""

    def __init__(self, engine: str, model_dir: Path, num_threads: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, engine, str(model_dir), str(num_threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, load: Load) -> Figures:
        """Raises RuntimeError when the process has failed, after what it printed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.write(json.dumps(asdict(load)) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith('{"tokens_per_s"'):
                self._process.send_signal(signal.SIGSTOP)
                return Figures(**json.loads(line))
        raise RuntimeError(f"the engine's process ended with {self._process.wait()}")

    def __enter__(self) -> EngineChild:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()


def build_engine(name: str, model_dir: Path, num_threads: int) -> Any:
    """transformers, native or native-int8, as the deployment builds it; activations in bf16."""
    import torch

    from serve_apps.llm.budget import CacheBudget

    torch.set_num_threads(num_threads)
    budget = CacheBudget()
    if name == "transformers":
        from transformers import AutoModelForCausalLM

        from serve_apps.llm.continuous_batching import ContinuousBatchingEngine

        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
        return ContinuousBatchingEngine(model.eval(), budget)

    from serve_apps.llm.native.engine import NativeEngine
    from serve_apps.llm.native.model import NativeModel

    model = NativeModel.load(model_dir, budget, dtype=torch.bfloat16, is_int8=name == "native-int8")
    return NativeEngine(model, budget)


def run(engine: Any, load: Load) -> Figures:
    """Keep `num_streams` answers in the engine until all are there."""
    from serve_apps.llm.engine import EngineRequest, Sampling

    sampling = Sampling(max_tokens=load.new_tokens, temperature=0)
    waiting = [
        EngineRequest(str(number), tuple(load.prompt(number)), sampling)
        for number in reversed(range(load.num_answers))
    ]
    began: dict[str, float] = {}
    first: dict[str, float] = {}
    found: list[StreamTimes] = []
    began_s = time.perf_counter()
    while len(found) < load.num_answers:
        while waiting and len(began) - len(found) < load.num_streams:
            request = waiting.pop()
            began[request.request_id] = time.perf_counter()
            engine.add(request)
        for output in engine.step():
            now_s, name = time.perf_counter(), output.request_id
            first.setdefault(name, now_s)
            if output.finish_reason is not None:
                found.append(StreamTimes(began[name], first[name], now_s, load.new_tokens))
    return figures_of(found, time.perf_counter() - began_s)


def main(name: str, model_dir: Path, num_threads: int) -> None:
    engine = build_engine(name, model_dir, num_threads)
    for line in sys.stdin:
        print(json.dumps(asdict(run(engine, Load(**json.loads(line))))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
