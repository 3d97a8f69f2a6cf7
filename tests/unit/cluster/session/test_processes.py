import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.session.processes import ProcessRecord, end_stack, find, is_alive, start
from cluster.session.scratch import scratch_dir

# A parent with a child; neither ends by itself.
FAMILY = (
    "import subprocess, sys, time; "
    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
    "print('born', flush=True); time.sleep(600)"
)
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "print('born', flush=True); time.sleep(600)"
)

# Its first thread is gone, another runs on.
BEHEADED = (
    "import ctypes, threading, time; threading.Thread(target=time.sleep, args=(600,)).start(); "
    "print('born', flush=True); ctypes.CDLL(None).pthread_exit(None)"
)

# One of Ray's agents: named by itself, with nothing left of its environment, writing its log.
AGENT = (
    "import ctypes, sys, time; ctypes.CDLL(None).prctl(15, b'ray::AnAgent'); "
    "log = open(sys.argv[1], 'w'); print('born', file=log, flush=True); time.sleep(600)"
)


def launch(stack: Path, code: str, part: str = "ray") -> ProcessRecord:
    log = stack / f"{part}.log"
    record = start(
        [sys.executable, "-c", code],
        stack=stack,
        part=part,
        environment=dict(os.environ),
        log_path=log,
    )
    deadline_s = time.monotonic() + 30
    while "born" not in log.read_text() and time.monotonic() < deadline_s:
        time.sleep(0.02)
    return record


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    end_stack(tmp_path)


def test_a_started_process_is_alive_until_it_ends(stack: Path) -> None:
    record = launch(stack, FAMILY)
    assert is_alive(record)
    end_stack(stack, heads=[record])
    assert not is_alive(record)


def test_a_reused_process_id_is_not_mistaken(stack: Path) -> None:
    record = launch(stack, FAMILY)
    assert not is_alive(record.model_copy(update={"created_at_s": record.created_at_s - 60}))


def test_an_ended_process_that_nobody_waited_for_is_not_alive(stack: Path) -> None:
    record = launch(stack, "print('born')")
    deadline_s = time.monotonic() + 10
    while is_alive(record) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    assert not is_alive(record)


def test_children_are_found_and_ended_even_when_their_parent_is_gone(stack: Path) -> None:
    record = launch(stack, FAMILY)
    assert len(find(stack)) == 2
    psutil.Process(record.pid).kill()
    while is_alive(record):
        time.sleep(0.01)
    (orphan,) = find(stack)
    end_stack(stack)
    assert find(stack) == []
    assert not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE


def test_a_process_that_ignores_the_request_is_killed(stack: Path) -> None:
    record = launch(stack, STUBBORN)
    assert end_stack(stack) == 1
    assert not is_alive(record)


def test_a_process_lives_as_long_as_any_of_its_threads(stack: Path) -> None:
    record = launch(stack, BEHEADED)
    process = psutil.Process(record.pid)
    while process.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert is_alive(record)
    process.kill()
    while is_alive(record):
        time.sleep(0.01)


def test_only_the_named_part_of_the_named_stack_is_ended(stack: Path, tmp_path: Path) -> None:
    other_stack = tmp_path / "other"
    other_stack.mkdir()
    ray, mlflow = launch(stack, FAMILY, "ray"), launch(stack, FAMILY, "mlflow")
    other = launch(other_stack, FAMILY, "ray")
    end_stack(stack, "ray")
    assert [is_alive(record) for record in (ray, mlflow, other)] == [False, True, True]
    end_stack(other_stack)


def test_a_shell_that_only_knows_the_home_is_no_part(stack: Path) -> None:
    environment = {**os.environ, "HELIOSTAT_HOME": str(stack)}
    shell = subprocess.Popen(["sleep", "600"], env=environment)
    try:
        assert find(stack) == []
        assert end_stack(stack) == 0
        assert shell.poll() is None
    finally:
        shell.kill()
        shell.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="names itself by prctl")
def test_an_agent_that_outlived_its_parents_is_found_by_its_log(stack: Path) -> None:
    log = scratch_dir(stack) / "logs" / "agent.log"
    log.parent.mkdir(parents=True)
    agent = subprocess.Popen([sys.executable, "-c", AGENT, str(log)], env={})
    try:
        while not log.exists() or "born" not in log.read_text():
            time.sleep(0.02)
        assert [process.pid for process in find(stack, "ray")] == [agent.pid]
        assert find(stack, "mlflow") == []
        assert find(stack.with_name("another")) == []
        assert end_stack(stack) == 1
    finally:
        agent.kill()
        agent.wait()
