"""Our language-model engine beside its peers: a Llama of 82 million random weights in bf16.

Ours is the whole stack as `heliostat up` starts it: a signed package, keys, limits, metering and
metrics on. Peers: vLLM's CPU build, serving the same files over HTTP from an environment that is
made for it; `transformers`' continuous batching, alone in a process. 128 tokens of prompt, never
twice the same, and 64 new ones; the same client, in rounds whose order alternates.

    python -m benchmarks.run llm_engine
    python -m benchmarks.llm_engine --quick        # a tiny model, few rounds: does it run?
    python -m benchmarks.llm_engine --threads 1    # for our engine; prints only
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml

from benchmarks.llm_peers.completions_load import Load
from benchmarks.llm_peers.engine_child import EngineChild
from benchmarks.llm_peers.figures import Figures
from benchmarks.llm_peers.model import FIRST_PAIR, FULL, QUICK, VOCAB_SIZE, Shape, save_model
from benchmarks.llm_peers.routing import compare_routing
from benchmarks.llm_peers.vllm_server import REQUIREMENT, VllmServer, install_vllm
from benchmarks.measure import Row, row_of
from tests.stack import Stack, new_stack

_MODEL = "llama"
_STREAMS = (1, 8, 32)
_TRANSFORMERS = "transformers' continuous batching, alone in a process"
_VLLM = f"{REQUIREMENT} over HTTP"
_GOALS_BESIDE_VLLM = {1: 1.1, 8: 1.2, 32: 1.0}


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    shape: Shape = FULL
    rounds: int = 5
    answers_per_stream: int = 2
    starts: int = 2
    """Of ours and of vLLM, each from nothing to its first token."""
    streams: tuple[int, ...] = _STREAMS
    num_threads: int = os.cpu_count() or 1
    """That our engine computes with; transformers' has all processors, and vLLM as it chooses."""


QUICK_PLAN = Plan(QUICK, rounds=2, answers_per_stream=1)


def measure(plan: Plan | None = None) -> tuple[Row, ...]:
    directory = Path(tempfile.mkdtemp(prefix="hst"))
    stack = new_stack(directory)
    # Tests have it on; by default it is off.
    stack = replace(stack, settings=stack.settings.model_copy(update={"access_log": False}))
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(shutil.rmtree, directory, ignore_errors=True)
        return tuple(_Benchmark(plan or Plan(), stack, directory).rows())


class _Benchmark:
    def __init__(self, plan: Plan, stack: Stack, directory: Path) -> None:
        self._plan, self._stack, self._directory = plan, stack, directory
        self._model_dir = save_model(directory / "model", plan.shape)
        self._seed = 0
        self._vllm: VllmServer | None = None

    def rows(self) -> Iterator[Row]:
        with contextlib.ExitStack() as serving:
            self._start_stack(serving)
            starts = self._deploy()
            try:
                python = install_vllm(self._directory / "environment")
            except RuntimeError as error:
                print(f"no rows beside vLLM: {error}", file=sys.stderr, flush=True)
            else:
                yield self._start_row(starts, self._start_vllm(python, serving))
                yield from self._beside_vllm()
            yield from self._beside_engines()
        yield from self._alone()
        yield compare_routing(self._model_dir, self._plan.shape, self._plan.rounds)

    def _beside_vllm(self) -> Iterator[Row]:
        assert self._vllm is not None
        ways = {"ours": self._through_gateway, "vllm": self._through_vllm}
        for num_streams in self._plan.streams:
            found = self._rounds(ways, num_streams)
            yield row_of(
                f"tokens/s at {num_streams} streams",
                pairs=_pairs(found, "ours", "vllm", "tokens_per_s"),
                peer_name=_VLLM,
                at_least=_GOALS_BESIDE_VLLM.get(num_streams),
            )
            yield row_of(
                f"seconds to the first token, p50 at {num_streams} streams",
                pairs=_pairs(found, "ours", "vllm", "ttft_p50_s"),
                peer_name=_VLLM,
                at_most=0.8,
            )

    def _beside_engines(self) -> Iterator[Row]:
        most, threads = self._plan.streams[-1], self._plan.num_threads
        with (
            EngineChild("transformers", self._model_dir, os.cpu_count() or 1) as transformers,
            EngineChild("native", self._model_dir, threads) as native,
        ):
            ways = {
                "ours": self._through_gateway,
                "transformers": transformers.run,
                "native": native.run,
            }
            found = self._rounds(ways, most)
        yield row_of(
            f"tokens/s at {most} streams",
            pairs=_pairs(found, "ours", "transformers", "tokens_per_s"),
            peer_name=_TRANSFORMERS,
            at_least=3,
        )
        yield row_of(
            f"tokens/s at {most} streams, through the gateway",
            pairs=_pairs(found, "ours", "native", "tokens_per_s"),
            peer_name="the same engine, alone in a process",
            at_least=0.88,
        )

    def _alone(self) -> Iterator[Row]:
        """Without the stack, whose idle processes would take their share of a small machine."""
        threads = self._plan.num_threads
        with EngineChild("native", self._model_dir, threads) as plain:
            weight_bytes = self._plan.shape.num_weights * torch.bfloat16.itemsize
            pairs = [
                (
                    plain.run(self._load(1)).decode_tokens_per_s * weight_bytes / 1e9,
                    _read_gb_per_s(),
                )
                for _ in range(self._plan.rounds)
            ]
            yield row_of(
                "GB/s of weights read, decoding 1 stream",
                pairs=pairs,
                peer_name="a sum over 1 GiB, the machine's memory bandwidth",
            )
            with EngineChild("native-int8", self._model_dir, threads) as in_8_bits:
                found = self._rounds({"int8": in_8_bits.run, "bf16": plain.run}, 1)
        yield row_of(
            "tokens/s of 1 stream, weights in int8",
            pairs=_pairs(found, "int8", "bf16", "decode_tokens_per_s"),
            peer_name="weights in bf16, both alone in a process",
            at_least=1.3,
        )

    def _start_row(self, ours: list[float], theirs: list[float]) -> Row:
        return row_of(
            "seconds from `heliostat deploy` to the first token",
            pairs=list(zip(ours, theirs, strict=True)),
            peer_name=f"`vllm serve` of {REQUIREMENT}, likewise",
            at_most=0.3,
        )

    def _start_stack(self, serving: contextlib.ExitStack) -> None:
        serving.callback(self._stack.run_cli, "down")
        _checked(self._stack.up())
        _checked(self._stack.run_cli("models", "import", self._model_dir, "--name", _MODEL))

    def _deploy(self) -> list[float]:
        """Seconds to the first token, of each start."""
        config = self._directory / "serve.yaml"
        config.write_text(yaml.safe_dump({"num_threads": self._plan.num_threads}), encoding="utf-8")
        found: list[float] = []
        for number in range(self._plan.starts):
            if number:
                _checked(self._stack.run_cli("undeploy", _MODEL))
            began_s = time.perf_counter()
            _checked(self._stack.run_cli("deploy", _MODEL, "--config", config))
            self._through_gateway(self._load(1, num_answers=1, new_tokens=1))
            found.append(time.perf_counter() - began_s)
        return found

    def _start_vllm(self, python: Path, serving: contextlib.ExitStack) -> list[float]:
        found: list[float] = []
        for number in range(self._plan.starts):
            server = VllmServer(python, self._model_dir, _free_port())
            is_last = number == self._plan.starts - 1
            with contextlib.ExitStack() as until_ready:
                until_ready.enter_context(server)
                server.wait_until_ready()
                self._ask(server.url, server.model, self._load(1, num_answers=1, new_tokens=1))
                found.append(time.perf_counter() - server.started_s)
                if is_last:
                    serving.push(until_ready.pop_all())
            self._vllm = server
        assert self._vllm is not None
        self._vllm.pause()
        return found

    def _rounds(
        self, ways: dict[str, Callable[[Load], Figures]], num_streams: int
    ) -> dict[str, list[Figures]]:
        found: dict[str, list[Figures]] = {name: [] for name in ways}
        for way in ways.values():
            way(self._load(num_streams))
        for index in range(self._plan.rounds):
            for name in list(ways) if index % 2 == 0 else list(reversed(ways)):
                figures = ways[name](self._load(num_streams))
                found[name].append(figures)
                print(f"{name}, {num_streams} streams: {figures}", flush=True)
        return found

    def _load(self, num_streams: int, *, num_answers: int = 0, new_tokens: int = 64) -> Load:
        self._seed += 1
        return Load(
            url="",
            model="",
            num_streams=num_streams,
            num_answers=num_answers or max(2, num_streams * self._plan.answers_per_stream),
            prompt_tokens=128,
            new_tokens=new_tokens,
            first_id=FIRST_PAIR,
            last_id=VOCAB_SIZE - 1,
            seed=self._seed,
        )

    def _through_gateway(self, load: Load) -> Figures:
        return self._ask(self._stack.settings.gateway_url, _MODEL, load)

    def _through_vllm(self, load: Load) -> Figures:
        assert self._vllm is not None
        self._vllm.resume()
        try:
            return self._ask(self._vllm.url, self._vllm.model, load)
        finally:
            self._vllm.pause()

    def _ask(self, url: str, model: str, load: Load) -> Figures:
        return replace(load, url=url, model=model).run(self._stack.key)


def _pairs(
    found: dict[str, list[Figures]], ours: str, peer: str, what: str
) -> Sequence[tuple[float, float]]:
    return [
        (getattr(mine, what), getattr(theirs, what))
        for mine, theirs in zip(found[ours], found[peer], strict=True)
    ]


def _read_gb_per_s() -> float:
    """What reading memory gives at best: the median of a few passes by all processors."""
    torch.set_num_threads(os.cpu_count() or 1)
    values = torch.ones(2**28)
    found: list[float] = []
    for _ in range(5):
        began_s = time.perf_counter()
        values.sum()
        found.append(values.nbytes / (time.perf_counter() - began_s) / 1e9)
    return statistics.median(found)


def _checked(done: subprocess.CompletedProcess[str]) -> None:
    if done.returncode:
        raise RuntimeError(f"{done.args}: {done.stderr}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    chosen = QUICK_PLAN if "--quick" in sys.argv[1:] else Plan()
    if "--threads" in sys.argv[1:]:
        chosen = replace(chosen, num_threads=int(sys.argv[sys.argv.index("--threads") + 1]))
    print(json.dumps([row.model_dump(mode="json") for row in measure(chosen)], indent=2))
