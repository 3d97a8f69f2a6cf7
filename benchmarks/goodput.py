"""Goodput of a run whose workers are killed: the share of its time that went into steps it kept.

A real stack, a real `jobs.train` under Ray Train on 2 workers (the Llama of 30 million parameters
of `train_throughput`, compiled, bfloat16), and a `kill -9` of one worker every 2 minutes, the first
after one. `python -m benchmarks.goodput --minutes 4` is a shorter one, which writes no result.
"""

from __future__ import annotations

import argparse
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import yaml

from benchmarks.measure import Row
from benchmarks.train_throughput import make_config
from cluster.tracking import open_client
from tests.faulty_runs import FaultyRun
from tests.stack import Stack, new_stack

GOAL = 0.85
MINUTES = 10.0
_KILL_EVERY_S = 120.0
_FIRST_KILL_S = 60.0
_CHECKPOINT_EVERY_STEPS = 5
_START_TIMEOUT_S = 300


def measure(minutes: float = MINUTES) -> tuple[Row, ...]:
    directory = Path(tempfile.mkdtemp(prefix="hst"))
    stack = new_stack(directory)
    try:
        up = stack.up()
        if up.returncode:
            raise RuntimeError(f"the stack did not start: {up.stderr}")
        found, num_kills = _run(stack, directory, minutes)
    finally:
        stack.run_cli("down")
        shutil.rmtree(directory, ignore_errors=True)
    return (_row(found, num_kills, minutes),)


def _run(stack: Stack, directory: Path, minutes: float) -> tuple[Mapping[str, float], int]:
    """Shares of the run's time, as the run itself logs them, and how often a worker was killed."""
    config_file, log = directory / "goodput.yaml", directory / "log"
    config_file.write_text(yaml.safe_dump(_config()), encoding="utf-8")
    run = FaultyRun.start(stack, config_file, log)
    try:
        run.wait_for_step(1, timeout_s=_START_TIMEOUT_S)
        num_kills = _kill_workers(run, minutes)
        run.process.send_signal(signal.SIGTERM)
        run.wait()
    finally:
        run.process.kill()
    match = re.search(r"/runs/([0-9a-f]{32})", run.output)
    if match is None:
        raise RuntimeError(f"the run has no record:\n{run.output[-2000:]}")
    metrics = open_client(stack.settings).get_run(match[1]).data.metrics
    shares = {
        name.removeprefix("goodput/"): value
        for name, value in metrics.items()
        if name.startswith("goodput/")
    }
    return shares, num_kills


def _kill_workers(run: FaultyRun, minutes: float) -> int:
    """How often, after so many minutes; a run that has ended is an error."""
    began_at, num_kills = time.monotonic(), 0
    while (now_s := time.monotonic() - began_at) < minutes * 60:
        if run.process.poll() is not None:
            raise RuntimeError(f"the run has ended:\n{run.output[-2000:]}")
        workers = run.workers()
        if workers and now_s >= _FIRST_KILL_S + num_kills * _KILL_EVERY_S:
            workers[num_kills % len(workers)].kill()
            num_kills += 1
        time.sleep(0.5)
    return num_kills


def _config() -> dict[str, object]:
    config = make_config("ray").model_dump(mode="json", exclude_unset=True)
    return {
        **config,
        "steps": 1_000_000,
        "log_every_steps": 1,
        "evaluate_every_steps": 1_000_000,
        "checkpoint": {"every_steps": _CHECKPOINT_EVERY_STEPS},
        "max_failures": 100,
    }


def _row(shares: Mapping[str, float], num_kills: int, minutes: float) -> Row:
    goodput = shares["useful"]
    rest = ", ".join(
        f"{name} {share:.3f}"
        for name, share in sorted(shares.items(), key=lambda item: -item[1])
        if name != "useful" and abs(share) >= 0.0005
    )
    return Row(
        metric=f"goodput, {num_kills} kills in {minutes:g} minutes",
        ours=goodput,
        peer=1.0,
        peer_name="all of the time",
        ratio=goodput,
        ratio_low=goodput,
        ratio_high=goodput,
        goal=f">= {GOAL}",
        met=goodput >= GOAL,
        note=f"the rest: {rest}",
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=MINUTES)
    print(measure(parser.parse_args().minutes)[0].model_dump_json(indent=1))
