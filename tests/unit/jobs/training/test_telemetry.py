"""What is measured of a run, and what is handed to the ledger."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.database import open_database
from cluster.ledger import Entry, Ledger
from jobs.data.dataset import Dataset
from jobs.models.causal_lm import CausalLm
from jobs.models.config import CausalLmConfig
from jobs.models.family import DataShape
from jobs.training.event_log import EventLog
from jobs.training.events import Event, Fault, Progress, Saved, Started
from jobs.training.flops import flops_per_token
from jobs.training.goodput import Goodput
from jobs.training.matmul_peak import known_peak, matmul_peak
from jobs.training.speed import SpeedMeter
from jobs.training.timing import Stopwatch
from jobs.training.usage import UsageMeter
from jobs.training.worker import WorkerJob, run_worker
from tests.unit.jobs.training.conftest import MakeConfig


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def started(world_size: int = 2, *, useful_s: float = 0.0, device: str = "cpu") -> Started:
    return Started(1, world_size, device, "tokens", 0, useful_s)


def progress(useful_s: float, *, warm_up_s: float = 0.0, evaluate_s: float = 0.0) -> Progress:
    return Progress(
        1, 2.0, 0.1, 5.0, useful_s=useful_s, warm_up_s=warm_up_s, seconds={"evaluate": evaluate_s}
    )


def test_flops_of_a_token_are_those_of_the_products_that_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    config = CausalLmConfig(
        family="causal_lm", hidden_size=64, num_layers=3, num_heads=4, loss_chunk_tokens=0
    )
    num_tokens = 32
    family = CausalLm(config, DataShape({}, vocab_size=100, sequence_length=num_tokens))
    model = family.build()
    # Of the kernels that compute attention at once, torch counts nothing on a CPU.
    model.set_attn_implementation("eager")
    tokens = torch.zeros((2, num_tokens + 1), dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        family.loss(model, {"tokens": tokens}).backward()
    counted = counter.get_total_flops() / (2 * num_tokens)
    assert flops_per_token(model, num_tokens) == pytest.approx(counted, rel=0.01)


def test_frozen_matrices_need_no_gradients_of_their_own() -> None:
    config = CausalLmConfig(family="causal_lm", hidden_size=64, num_layers=2, num_heads=4)
    model = CausalLm(config, DataShape({}, vocab_size=100, sequence_length=8)).build()
    whole = flops_per_token(model, 8)
    model.requires_grad_(False)
    frozen = flops_per_token(model, 8)
    attention = 12 * 2 * 64 * 8
    assert (frozen - attention) / (whole - attention) == pytest.approx(4 / 6)
    assert flops_per_token(torch.nn.Linear(2, 2), 8) is None


def test_a_peak_is_measured_once_and_kept(tmp_path: Path) -> None:
    path, cpu = tmp_path / "cache" / "peaks.json", torch.device("cpu")
    threads = torch.get_num_threads()
    assert known_peak(path, cpu, "fp32", threads) is None
    found = matmul_peak(path, cpu, "fp32")
    assert found > 1e9
    assert matmul_peak(path, cpu, "fp32") == found == known_peak(path, cpu, "fp32", threads)
    path.write_text("[broken")
    assert known_peak(path, cpu, "fp32", threads) is None


def test_a_stopwatch_adds_up_parts_until_they_are_taken() -> None:
    clock = Clock()
    watch = Stopwatch(clock=clock)
    for part, seconds in (("data", 1.0), ("forward", 2.0), ("data", 0.5)):
        with watch.measure(part):
            clock.now += seconds
    assert watch.take() == {"data": 1.5, "forward": 2.0}
    assert watch.take() == {}


def test_a_first_step_is_as_useful_as_the_second() -> None:
    clock = Clock()
    meter = SpeedMeter(100, clock=clock, useful_s=50.0)
    for seconds in (10.0, 2.0, 3.0):
        clock.now += seconds
        with meter.paused():
            clock.now += 5.0
        meter.count()
    assert (meter.useful_s, meter.warm_up_s) == (50.0 + 2.0 + 2.0 + 3.0, 8.0)


def test_goodput_counts_each_step_once_and_accounts_for_the_rest() -> None:
    clock = Clock()
    goodput = Goodput(began_at=0.0, clock=clock)

    def at(now: float, event: Event) -> None:
        clock.now = now
        goodput.observe(event)

    at(10, started())
    at(50, progress(30.0, warm_up_s=8.0, evaluate_s=2.0))
    at(52, Saved(1, 1, 5.0, blocked_s=1.0))
    at(90, progress(65.0, warm_up_s=8.0))
    # A worker is lost; training goes on from the checkpoint.
    at(100, started(useful_s=30.0))
    at(140, progress(66.0, warm_up_s=4.0))
    found = {name: round(share * 140, 6) for name, share in goodput.breakdown().items()}
    assert found == {
        "useful": 66.0,
        "lost": 35.0,
        "start": 10.0,
        "restart": 10.0,
        "warm_up": 12.0,
        "checkpoint": 1.0,
        "evaluate": 2.0,
        "before": 0.0,
        "other": 4.0,
    }
    assert goodput.share() == pytest.approx(66 / 140)


def test_goodput_counts_from_the_very_beginning_of_a_run() -> None:
    clock = Clock()
    clock.now = 1000.0
    goodput = Goodput(began_at=800.0, clock=clock)
    goodput.observe(started(useful_s=150.0))
    clock.now = 1100.0
    goodput.observe(progress(240.0))
    assert goodput.share() == pytest.approx(240 / 300)
    assert sum(goodput.breakdown().values()) == pytest.approx(1.0)
    assert goodput.breakdown()["before"] == pytest.approx(50 / 300)


def test_faults_are_kept_across_drivers(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    EventLog(path).add(Fault(7, "loss_spike", "back to step 5"))
    with path.open("a") as file:
        file.write('{"kind": "los')
        file.write("\n")
    log = EventLog(path)
    log.add(Fault(9, "loss_spike", "again"))
    log.add(Fault(9, "worker_lost", "worker 1"))
    assert log.counts() == {"loss_spike": 2, "worker_lost": 1}
    last = json.loads(path.read_text().splitlines()[-1])
    assert (last["step"], last["kind"], last["text"]) == (9, "worker_lost", "worker 1")


def test_faults_are_counted_where_no_line_can_be_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = EventLog(tmp_path / "no such directory" / "events.jsonl")
    log.add(Fault(7, "loss_spike", "back to step 5"))
    assert log.counts() == {"loss_spike": 1}
    assert "No such file or directory" in caplog.text


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(open_database(f"sqlite:///{tmp_path / 'ledger.db'}"))


def test_what_workers_hold_is_booked_by_their_number(
    ledger: Ledger, make_config: MakeConfig
) -> None:
    clock = Clock()
    config = make_config(tenant="acme", threads_per_worker=3)
    meter = UsageMeter(ledger.record, config, run_id="r", num_workers=2, clock=clock)
    clock.now = 10.0
    meter.observe(started(2, device="cuda"))
    clock.now = 20.0
    meter.observe(started(1, device="cuda"))
    clock.now = 25.0
    meter.book()
    meter.book()
    (total,) = ledger.totals(tenant="acme")
    assert (total.kind, total.model) == ("training", "tiny")
    assert total.gpu_s == 20 * 2 + 5 * 1
    assert total.cpu_s == 3 * total.gpu_s


def test_a_ledger_that_fails_gets_the_same_entries_again(
    ledger: Ledger, make_config: MakeConfig
) -> None:
    clock = Clock()
    num_calls = 0

    def record(entries: Sequence[Entry]) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 1:
            # Taken, but the answer is lost.
            ledger.record(entries)
        if num_calls < 3:
            raise OSError("gone")
        ledger.record(entries)

    meter = UsageMeter(record, make_config(), run_id="r", num_workers=1, clock=clock)
    for now in (5.0, 7.0, 11.0):
        clock.now = now
        meter.book()
    (total,) = ledger.totals(source="r")
    assert total.cpu_s == 11.0


def test_drivers_that_follow_each_other_add_up(ledger: Ledger, make_config: MakeConfig) -> None:
    for _ in range(2):
        clock = Clock()
        meter = UsageMeter(ledger.record, make_config(), run_id="r", num_workers=1, clock=clock)
        with meter.running():
            clock.now = 4.0
    assert ledger.totals(source="r")[0].cpu_s == 8.0


def test_a_worker_tells_where_its_seconds_go(
    make_config: MakeConfig, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.training.worker._Worker._export", lambda self: None)
    events: list[Any] = []
    config = make_config(steps=8, log_every_steps=4, evaluate_every_steps=3,
                         checkpoint={"every_steps": 3})  # fmt: skip
    run_worker(WorkerJob(config, digits.directory, tmp_path), events.append)
    first, second = (event for event in events if isinstance(event, Progress))
    assert first.gradient_norm is not None
    assert first.gradient_norm > 0
    assert first.memory_bytes > 50e6
    assert first.seconds.keys() >= {"data", "forward", "backward", "step", "evaluate", "checkpoint"}
    assert 0 < first.useful_s < second.useful_s
    again: list[Any] = []
    run_worker(WorkerJob(config, digits.directory, tmp_path), again.append)
    (resumed,) = (event for event in again if isinstance(event, Started))
    assert resumed.useful_s == pytest.approx(second.useful_s, abs=0.5)
